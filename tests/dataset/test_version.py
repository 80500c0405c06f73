"""Versions never change, and the pointer moves last."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from momalisa.dataset import FORMAT, Dataset, Place, Version
from momalisa.records import CAPTIONS, IMAGES, OK, REJECTED, TOLD, Artwork

VERSION = Version(
    images=("images/b", "images/a"), captions={"blip": ("captions/c2", "captions/c1")}, latents={"vae": ("latents/l",)}
)
LATER = ["images/c", "images/new", "captions/c3", "latents/l2"]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Nothing published; the tables that versions of these tests name are there."""
    found = Dataset(str(tmp_path))
    for path in sorted(VERSION.paths().union(LATER)):
        found.store.write_bytes(path, b"")
    return found


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
    pointer = dataset.store.read_json("refs/latest")
    assert (pointer["manifest"], pointer["sequence"]) == (f"manifests/{digest}.json", 1)


def test_an_old_version_stays_as_it_was(dataset: Dataset) -> None:
    first = dataset.publish(VERSION)
    before = dataset.store.read_bytes(f"manifests/{first}.json")
    grown = VERSION.with_images(["images/c"]).with_captions("blip", ["captions/c3"]).with_latents("other", ["latents/l2"])
    assert dataset.publish(grown) != first
    assert dataset.store.read_bytes(f"manifests/{first}.json") == before
    assert VERSION.captions == {"blip": ("captions/c2", "captions/c1")}
    assert dataset.latest().captions == {"blip": ("captions/c1", "captions/c2", "captions/c3")}
    assert dataset.latest().latents == {"vae": ("latents/l",), "other": ("latents/l2",)}


def test_publishing_the_same_again_writes_nothing(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = dataset.publish(VERSION)
    monkeypatch.setattr(dataset.store, "write_bytes", lambda path, data: pytest.fail(f"{path} was written"))
    assert dataset.publish(VERSION) == digest


def test_a_version_whose_tables_are_not_there_is_not_published(dataset: Dataset) -> None:
    first = dataset.publish(VERSION)
    with pytest.raises(ValueError, match="2 tables of this version are missing, for example images/gone1"):
        dataset.publish(VERSION.with_images(["images/gone1", "images/gone2", "images/c"]))
    assert dataset.latest().sha256 == first


def test_killed_before_the_pointer_the_old_version_stands(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.publish(VERSION)
    write = dataset.store.write_bytes

    def killed(path: str, data: bytes) -> None:
        if path.startswith("refs/"):
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(dataset.store, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        dataset.publish(VERSION.with_images(["images/new"]))
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


def texts(dataset: Dataset, paths: tuple[str, ...]) -> list[str]:
    return [found["id"] for found in dataset.rows(paths)]


def test_works_are_taken_out_of_every_family_by_copies(dataset: Dataset) -> None:
    first, second = (dataset.put_rows("captions/blip", [row(name) for name in names], CAPTIONS) for names in ("abc", "de"))
    captions = dataset.put_rows("captions/other", [row("a"), row("e")], CAPTIONS)
    version = Version(
        (first, second), ("duplicates/d",), {"blip": (first,), "other": (captions,)}, ("edits/e",), {"vae": (second,)}
    )
    before = version.as_json()
    changed, copies = dataset.without_works(version, {"b", "d", "e", "unknown"})
    assert texts(dataset, changed.images) == ["a", "c"]
    assert {key: texts(dataset, paths) for key, paths in changed.captions.items()} == {"blip": ["a", "c"], "other": ["a"]}
    assert changed.latents == {"vae": ()}
    assert (changed.duplicates, changed.edits) == (version.duplicates, version.edits)
    assert copies == {first: changed.images[0]}
    assert version.as_json() == before
    assert set(texts(dataset, (first, second))) == set("abcde")  # what was published stays readable


def test_taking_out_nothing_or_what_is_not_there_changes_nothing(dataset: Dataset) -> None:
    path = dataset.put_rows("images", [row("a")], CAPTIONS)
    version, files = Version((path,)), dataset.store.list("")
    assert dataset.without_works(version, set()) == dataset.without_works(version, {"b"}) == (version, {})
    assert dataset.store.list("") == files


def test_a_copy_is_the_table_that_its_rows_would_have_made(dataset: Dataset) -> None:
    path = dataset.put_rows("images", [row("a"), row("b")], CAPTIONS)
    changed, _ = dataset.without_works(Version((path,)), {"b"})
    assert changed.images == (dataset.put_rows("images", [row("a")], CAPTIONS),)


def test_where_works_are_and_whether_they_are_usable(dataset: Dataset) -> None:
    one = dataset.put_rows("images", [row("a"), row("b", REJECTED)], CAPTIONS)
    two = dataset.put_rows("images", [row("c")], CAPTIONS)
    assert dataset.places([one, two]) == {"a": Place(one, True), "b": Place(one, False), "c": Place(two, True)}
    assert dataset.places([]) == {}


def test_what_rows_tell_is_known_with_their_places(dataset: Dataset) -> None:
    sea = Artwork("a", title="Sea", image_url="x")
    works = [sea, Artwork("b", REJECTED, title="Sea"), Artwork("c", title="Sky", image_url="x")]
    path = dataset.put_rows("images", [work.row() for work in works], IMAGES)
    places = dataset.told_places([path])
    assert {id: Place(*place[:2]) for id, place in places.items()} == dataset.places([path])
    assert places["a"].told == places["b"].told != places["c"].told
    assert places["a"].address == places["c"].address != places["b"].address
    assert places["a"].told == hash(tuple(getattr(sea, name) for name in TOLD))
