"""What no published version names goes, when it is old; everything else stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from momalisa.dataset import Dataset
from momalisa.dataset.draft import Draft, Entry
from momalisa.dataset.garbage import garbage, sweep
from momalisa.records import CORRECTIONS, IMAGES
from tests.dataset.conftest import add, caption, work


def age(dataset: Dataset, hours: float) -> None:
    for path in dataset.store.files(""):
        when = time.time() - hours * 3600
        os.utime(Path(dataset.store.root) / path, (when, when))


def test_only_old_files_that_no_version_names_go(collection: Dataset) -> None:
    before = collection.store.list("")
    orphan = collection.put_rows("images", [work(7).row()], IMAGES)
    collection.store.write_bytes("captions/blip-1/abc.parquet.12.partial", b"half")
    collection.store.write_bytes("refs/latest.12.partial", b"half")
    collection.store.write_json(f"manifests/{'0' * 64}.json", {})  # of a run that died before it moved the pointer
    age(collection, 25)
    young = collection.put_rows("images", [work(8).row()], IMAGES)
    found = garbage(collection)
    assert sorted(found) == [
        "captions/blip-1/abc.parquet.12.partial",
        orphan,
        f"manifests/{'0' * 64}.json",
        "refs/latest.12.partial",
    ]
    assert found[orphan].size > 100
    sweep(collection, found)
    assert sorted(collection.store.files("")) == sorted([*before, young, "refs/latest.lock"])
    assert set(garbage(collection, grace_hours=0)) == {young}
    assert not garbage(collection, grace_hours=1)


def test_a_table_that_is_written_again_is_young(dataset: Dataset) -> None:
    path = dataset.put_rows("images", [work(0).row()], IMAGES)
    age(dataset, 25)
    assert set(garbage(dataset)) == {path}
    dataset.put_rows("images", [work(0).row()], IMAGES)
    assert not garbage(dataset)


def test_older_versions_stay_unless_they_are_told_by_name(dataset: Dataset) -> None:
    old = add(dataset, [work(0)], [caption("w0")], captioner="old")
    dataset.publish(type(old)(images=old.images))
    new = add(dataset, [], [caption("w0", "anew")], captioner="new")
    age(dataset, 25)
    assert not garbage(dataset)
    found = garbage(dataset, delete=[old.sha256[:8]])
    assert set(found) == {*old.captions["old"], f"manifests/{old.sha256}.json"}
    sweep(dataset, found)
    assert dataset.latest() == new
    assert old.sha256 not in dataset.published()
    assert [entry.sha256 for entry in dataset.log()][-1] == old.sha256  # history stays
    assert {row["id"] for row in dataset.rows(new.images)} == {"w0"}


def test_the_latest_and_unknown_names_are_refused(dataset: Dataset) -> None:
    add(dataset, [work(0)])
    latest = add(dataset, [work(1)])
    with pytest.raises(ValueError, match="is the latest version and cannot be deleted; check out another one first"):
        garbage(dataset, delete=[latest.sha256])
    with pytest.raises(ValueError, match="nothing is no published version"):
        garbage(dataset, delete=["nothing"])


def test_a_sweep_that_dies_leaves_only_what_the_next_one_takes(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    old = add(dataset, [work(0)])
    dataset.publish(type(old)())
    age(dataset, 25)
    found = garbage(dataset, delete=[old.sha256])
    delete = dataset.store.delete

    def dies(path: str) -> None:
        if path.startswith("images/"):
            raise KeyboardInterrupt
        delete(path)

    with monkeypatch.context() as patch:
        patch.setattr(dataset.store, "delete", dies)
        with pytest.raises(KeyboardInterrupt):
            sweep(dataset, found)
    with pytest.raises(ValueError, match="no published version"):
        dataset.resolve(old.sha256)
    assert set(garbage(dataset)) == set(old.images)


def test_what_is_published_between_looking_and_sweeping_stays(dataset: Dataset) -> None:
    add(dataset, [work(0)])
    path = dataset.put_rows("images", [work(1).row()], IMAGES)
    found = garbage(dataset, grace_hours=-1)
    assert path in found
    dataset.update(lambda latest: latest.with_images([path]))
    sweep(dataset, found)
    assert dataset.ids(dataset.latest().images) == {"w0", "w1"}


def test_what_a_draft_names_stays_while_its_job_is_at_work(dataset: Dataset) -> None:
    draft = Draft(dataset.store, "collect", "0123")
    tables = [
        dataset.put_rows(folder, [work(1).row()], schema) for folder, schema in (("images", IMAGES), ("corrections", CORRECTIONS))
    ]
    draft.add(Entry(tables[0]))
    age(dataset, 25)
    assert set(tables) <= set(garbage(dataset))  # the job is dead
    draft.add(Entry("", told=tables[1]))
    assert not garbage(dataset)  # it is at work, and has been for long
    draft.clear()
    assert set(garbage(dataset)) == set(tables)
