"""Versions never change, and the pointer moves last."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from momalisa.dataset import FORMAT, Dataset, Version
from momalisa.records import CAPTIONS, OK, REJECTED

VERSION = Version(images=("images/b.parquet", "images/a.parquet"), captions={"blip": ("c2", "c1")}, latents={"vae": ("l",)})


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(str(tmp_path))


def row(work_id: str, status: str = OK) -> dict[str, Any]:
    short = f"A MOMA artwork of: {work_id}"
    return {"id": work_id, "short": short, "long": "", "fused": short, "status": status, "error": ""}


def test_before_anything_is_published_there_is_an_empty_version(dataset: Dataset) -> None:
    assert dataset.latest() == Version()


def test_what_is_published_is_the_latest(dataset: Dataset) -> None:
    digest = dataset.publish(VERSION)
    assert dataset.latest().as_json() == VERSION.as_json()
    assert digest == VERSION.sha256 == dataset.latest().sha256
    assert dataset.store.list("manifests") == [f"manifests/{digest}.json"]
    assert dataset.store.read_json("refs/latest") == {"manifest": f"manifests/{digest}.json"}


def test_an_old_version_stays_as_it_was(dataset: Dataset) -> None:
    first = dataset.publish(VERSION)
    before = dataset.store.read_bytes(f"manifests/{first}.json")
    grown = VERSION.with_images(["images/c.parquet"]).with_captions("blip", ["c3"]).with_latents("other", ["l2"])
    assert dataset.publish(grown) != first
    assert dataset.store.read_bytes(f"manifests/{first}.json") == before
    assert VERSION.captions == {"blip": ("c2", "c1")}
    assert dataset.latest().captions == {"blip": ("c1", "c2", "c3")}
    assert dataset.latest().latents == {"vae": ("l",), "other": ("l2",)}


def test_publishing_the_same_again_writes_no_manifest(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.publish(VERSION)
    written: list[str] = []
    monkeypatch.setattr(dataset.store, "write_json", lambda path, value: written.append(path))
    dataset.publish(VERSION)
    assert written == ["refs/latest"]


def test_killed_before_the_pointer_the_old_version_stands(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.publish(VERSION)
    write = dataset.store.write_bytes

    def killed(path: str, data: bytes) -> None:
        if path.startswith("refs/"):
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(dataset.store, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        dataset.publish(VERSION.with_images(["images/new.parquet"]))
    monkeypatch.undo()
    assert len(dataset.store.list("manifests")) == 2
    assert dataset.latest().sha256 == VERSION.sha256


@given(paths=st.lists(st.text(), unique=True, max_size=6), seed=st.integers())
def test_the_hash_does_not_know_the_order(paths: list[str], seed: int) -> None:
    shuffled = random.Random(seed).sample(paths, len(paths))
    captions = {path: tuple(paths) for path in paths}
    again = {path: tuple(shuffled) for path in shuffled}
    assert Version(tuple(paths), captions, captions).sha256 == Version(tuple(shuffled), again, again).sha256


@given(paths=st.lists(st.text(), max_size=6), more=st.text())
def test_the_hash_knows_every_path_once(paths: list[str], more: str) -> None:
    version = Version().with_images(paths)
    assert version.with_images(paths).sha256 == version.sha256
    assert (version.with_images([more]).sha256 == version.sha256) == (more in paths)


def test_a_manifest_of_another_release_is_refused(dataset: Dataset) -> None:
    digest = dataset.publish(VERSION)
    dataset.store.write_json(f"manifests/{digest}.json", {**VERSION.as_json(), "format": FORMAT + 1})
    with pytest.raises(ValueError, match=f"manifest format {FORMAT + 1} is not {FORMAT}"):
        dataset.latest()


def test_rows_are_ordered_by_id_and_the_same_rows_are_the_same_table(dataset: Dataset) -> None:
    rows = [row("b"), row("a", REJECTED), row("c")]
    path = dataset.put_rows("captions/blip", rows, CAPTIONS)
    assert dataset.put_rows("captions/blip", rows[::-1], CAPTIONS) == path
    assert [found["id"] for found in dataset.rows([path])] == ["a", "b", "c"]
    assert next(dataset.rows([path], ["id"])) == {"id": "a"}
    assert dataset.ids([path]) == {"a", "b", "c"}
    assert dataset.ids((path,), only_ok=True) == {"b", "c"}


def test_rows_come_in_the_order_of_tables_whatever_their_listing(dataset: Dataset) -> None:
    paths = [dataset.put_rows("captions/blip", [row(name)], CAPTIONS) for name in "abc"]
    assert list(dataset.rows(paths)) == list(dataset.rows(paths[::-1]))


def test_a_row_without_a_field_is_refused(dataset: Dataset) -> None:
    with pytest.raises((pa.ArrowInvalid, ValueError)):
        dataset.put_rows("captions/blip", [{**row("a"), "short": None}], CAPTIONS)
