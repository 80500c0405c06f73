"""What was published, in order, wherever a process died; and two runs that publish at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from momalisa.dataset import LATEST, Conflict, Dataset, Version
from momalisa.records import CAPTIONS, IMAGES
from tests.dataset.conftest import add, caption, work


def shas(dataset: Dataset) -> list[str]:
    return [entry.sha256 for entry in dataset.log()]


def test_the_log_holds_every_publication_newest_first(dataset: Dataset) -> None:
    assert dataset.log() == []
    versions = [add(dataset, [work(n)]) for n in range(3)]
    dataset.publish(versions[0])
    assert shas(dataset) == [versions[n].sha256 for n in (0, 2, 1, 0)]
    assert [entry.sequence for entry in dataset.log()] == [4, 3, 2, 1]
    assert all(entry.time.endswith("+00:00") for entry in dataset.log())
    assert dataset.published() == [versions[n].sha256 for n in (0, 2, 1)]


@pytest.mark.parametrize("dies_at", ["manifests/", "refs/log/", "refs/latest"])
def test_the_log_is_whole_wherever_a_publication_dies(dataset: Dataset, dies_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = [add(dataset, [work(n)]) for n in range(2)]
    new = versions[-1].with_images([dataset.put_rows("images", [work(7).row()], IMAGES)])
    write = dataset.store.write_bytes

    def dies(path: str, data: bytes) -> None:
        if path.startswith(dies_at):
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(dataset.store, "write_bytes", dies)
        with pytest.raises(KeyboardInterrupt):
            dataset.publish(new)
    before = [version.sha256 for version in versions[::-1]]
    assert shas(dataset) == before
    dataset.publish(new)
    assert shas(dataset) == [new.sha256, *before]


def test_a_pointer_without_a_sequence_is_the_first(dataset: Dataset) -> None:
    first, second = add(dataset, [work(0)]), add(dataset, [work(1)])
    dataset.store.write_json(LATEST, {"manifest": f"manifests/{first.sha256}.json"})
    dataset.publish(second)
    assert [(entry.sequence, entry.sha256) for entry in dataset.log()] == [(2, second.sha256), (1, first.sha256)]


def test_a_name_is_the_beginning_of_one_published_hash(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="holds no version: run the collect job first"):
        dataset.resolve("latest")
    version = add(dataset, [work(0)])
    assert dataset.resolve("latest") == dataset.resolve(version.sha256[:7]) == version.sha256
    with pytest.raises(ValueError, match="xyz is no published version"):
        dataset.resolve("xyz")
    unpublished = Version()
    dataset.store.write_json(f"manifests/{unpublished.sha256}.json", unpublished.as_json())
    with pytest.raises(ValueError, match="is no published version"):
        dataset.resolve(unpublished.sha256)
    monkeypatch.setattr(dataset, "published", lambda: ["abc1", "abc2"])
    with pytest.raises(ValueError, match=r"abc begins 2 versions \(abc1, abc2\): give more of it"):
        dataset.resolve("abc")


def test_a_manifest_that_was_changed_is_refused(dataset: Dataset) -> None:
    version = add(dataset, [work(0)])
    dataset.store.write_json(f"manifests/{version.sha256}.json", Version().as_json())
    with pytest.raises(ValueError, match=r"manifests/.*\.json was changed"):
        dataset.latest()


def test_who_expects_another_latest_publishes_nothing(dataset: Dataset) -> None:
    before = add(dataset, [work(0)])
    after = add(dataset, [work(1)])
    with pytest.raises(Conflict, match=f"another run published version {after.sha256[:12]} in the meantime; run again"):
        dataset.publish(before, expected=before)
    assert dataset.latest() == after
    dataset.publish(before, expected=after)
    assert dataset.latest() == before


def test_additions_from_many_threads_are_all_kept(dataset: Dataset) -> None:
    def run(number: int) -> None:
        own = Dataset(dataset.store.root)
        if number % 2:
            add_images = [own.put_rows("images", [work(number).row()], IMAGES)]
            own.update(lambda latest: latest.with_images(add_images))
        else:
            path = own.put_rows(f"captions/c{number}", [caption("w")], CAPTIONS)
            own.update(lambda latest: latest.with_captions(f"c{number}", [path]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latest = dataset.latest()
    assert dataset.ids(latest.images) == {"w1", "w3", "w5", "w7"}
    assert sorted(latest.captions) == ["c0", "c2", "c4", "c6"]
    assert [entry.sequence for entry in dataset.log()] == list(range(8, 0, -1))


def test_two_collections_of_the_same_works_are_a_conflict_that_loses_nothing(dataset: Dataset) -> None:
    began = dataset.latest()
    first = dataset.put_rows("images", [work(0).row(), work(1).row()], IMAGES)
    second = dataset.put_rows("images", [work(1, title="otherwise").row(), work(2).row()], IMAGES)
    third = dataset.put_rows("images", [work(3).row()], IMAGES)
    dataset.add("images", [first], began)
    with pytest.raises(Conflict, match=r"another run has collected 1 of these works in the meantime, for example w1;.*Run again"):
        dataset.add("images", [second], began)
    assert dataset.latest().images == (first,)
    dataset.add("images", [third], began)
    dataset.add("images", [first], began)  # the very same table is no conflict
    assert set(dataset.latest().images) == {first, third}


def test_captions_of_a_work_that_another_run_described_are_left_to_it(dataset: Dataset) -> None:
    began = dataset.latest()
    theirs = dataset.put_rows("captions/c", [caption("a", "theirs"), caption("b", "theirs")], CAPTIONS)
    ours = dataset.put_rows("captions/c", [caption("b", "ours"), caption("d", "ours")], CAPTIONS)
    twice = dataset.put_rows("captions/c", [caption("a", "ours")], CAPTIONS)
    dataset.add("captions/c", [theirs], began)
    dataset.add("captions/c", [ours, twice], began)
    rows = list(dataset.rows(dataset.latest().captions["c"]))
    assert sorted((row["id"], row["short"]) for row in rows) == [("a", "theirs"), ("b", "theirs"), ("d", "ours")]


@pytest.mark.parametrize("family", ["captions/c", "latents/c"])
def test_what_was_made_of_a_picture_or_words_that_are_replaced_meanwhile_is_left_out(dataset: Dataset, family: str) -> None:
    old = [work(0), work(1), work(2), work(3)]
    began = add(dataset, old)
    new = [work(0), replace(work(1), sha256="new"), replace(work(2), title="Right"), replace(work(3), credit="Gift of Ann")]
    changed, _ = dataset.without_works(began, {"w1", "w2", "w3"})
    dataset.publish(changed.with_images([dataset.put_rows("images", [one.row() for one in new[1:]], IMAGES)]))
    ours = dataset.put_rows(family, [caption(one.id) for one in old], CAPTIONS)
    dataset.add(family, [ours], began)
    assert dataset.ids(dataset.latest().families()[family]) == {"w0", "w3"}
    again = dataset.latest()
    dataset.add(family, [dataset.put_rows(family, [caption("w1"), caption("w2")], CAPTIONS)], again)
    assert dataset.ids(dataset.latest().families()[family]) == {"w0", "w1", "w2", "w3"}


def _hold(path: str, ready: multiprocessing.synchronize.Event) -> None:
    with Dataset(path).store._locked(LATEST):
        ready.set()
        time.sleep(600)


def test_a_writer_waits_for_the_lock_and_has_it_when_its_holder_is_killed(dataset: Dataset) -> None:
    version = add(dataset, [work(0)])
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(dataset.store.root, ready))
    holder.start()
    try:
        assert ready.wait(60)
        done = threading.Event()
        thread = threading.Thread(target=lambda: (dataset.publish(Version()), done.set()))
        thread.start()
        assert not done.wait(0.3)
        assert dataset.latest() == version  # readers never wait
    finally:
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    thread.join(30)
    assert dataset.latest() == Version()


def test_an_update_that_always_loses_says_so(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset.store, "move_pointer", lambda *_: False)
    monkeypatch.setattr("momalisa.dataset.time.sleep", lambda _: None)
    with pytest.raises(Conflict, match="other runs publish all the time; run again"):
        dataset.publish(Version())


def test_locks_are_no_files(dataset: Dataset, tmp_path: Path) -> None:
    add(dataset, [work(0)])
    assert (Path(dataset.store.root) / "refs" / "latest.lock").exists()
    assert dataset.store.list("refs") == ["refs/latest"]
