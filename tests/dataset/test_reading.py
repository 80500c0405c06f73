"""Columns without pictures, texts with a curator's words, and latents that follow them."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from momalisa.dataset import Dataset
from momalisa.dataset.edits import with_edits
from momalisa.dataset.wording import reworded
from momalisa.records import IMAGES, LATENTS, OK
from momalisa.storage import READERS
from tests.dataset.conftest import BLIP, add, caption, work


def test_columns_come_in_the_order_of_tables_and_without_pictures(collection: Dataset) -> None:
    paths = collection.latest().images
    tables = collection.columns(reversed(paths), ["id"])
    assert tables == [[{"id": row["id"]} for row in collection.rows([path])] for path in sorted(paths)]
    for rows in collection.columns(paths):
        assert set(rows[0]) == set(IMAGES.names) - {"bytes", "thumbnail"}
    assert collection.columns([]) == []


def test_columns_fetch_no_picture(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    big = np.random.default_rng(0).bytes(2_000_000)
    add(dataset, [work(n, bytes=big) for n in range(3)])
    (path,) = dataset.latest().images
    fetched = 0
    opened = dataset.store._open

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal fetched
            data = super().read(size)
            fetched += len(data)
            return data

    def counted(name: str) -> Counted:
        with opened(name) as file:
            return Counted(file.read())

    monkeypatch.setattr(dataset.store, "_open", counted)
    assert dataset.ids([path]) == {"w0", "w1", "w2"}
    assert 0 < fetched < 100_000
    assert sum(len(row["bytes"]) for row in dataset.rows([path], ["id", "bytes"])) == 6_000_000
    assert fetched > 2_000_000  # the same bytes thrice are stored once


def test_rows_of_many_tables_are_never_held_all_at_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [dataset.put_rows("images", [work(n).row()], IMAGES) for n in range(2 * READERS)]
    get, fetched = dataset.store.get_columns, []
    monkeypatch.setattr(dataset.store, "get_columns", lambda path, names: (fetched.append(path), get(path, names))[1])
    rows = dataset.small_rows(paths, ["id"])
    first = next(rows)
    assert len(fetched) <= READERS
    assert [first, *rows] == list(dataset.rows(paths, ["id"]))
    assert sorted(fetched[: len(paths)]) == sorted(paths)


def test_tables_without_some_works_are_copied_side_by_side(collection: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    version, get, together = collection.latest(), collection.store.get_table, threading.Barrier(2, timeout=20)
    assert len(version.images) == 2
    monkeypatch.setattr(collection.store, "get_table", lambda path: (together.wait(), get(path))[1])
    gone = {next(iter(collection.ids([path]))) for path in version.images}
    changed, copies = collection.without_works(replace(version, captions={}, latents={}), gone)
    assert copies.keys() == set(version.images)
    assert collection.ids(changed.images) == collection.ids(version.images) - gone


def test_a_curator_wins_and_what_hangs_twice_or_failed_has_no_text(collection: Dataset) -> None:
    version = collection.latest()
    machine = {f"w{n}": f"A MOMA artwork of: w{n}" for n in range(4)}
    assert collection.texts(version, BLIP) == machine
    edited = with_edits(collection, version, {"w1": "A MOMA artwork of: a boat", "w4": "described by hand", "w5": "again"})
    assert collection.texts(edited, BLIP) == machine | {"w1": "A MOMA artwork of: a boat", "w4": "described by hand"}
    assert collection.texts(edited, "another") == {"w1": "A MOMA artwork of: a boat", "w4": "described by hand"}


def test_an_edit_survives_captioning_anew(collection: Dataset) -> None:
    collection.publish(with_edits(collection, collection.latest(), {"w1": "mine"}))
    version = add(collection, [], [caption("w1", "another model's"), caption("w2", "other")], captioner="blip-2")
    assert collection.texts(version, "blip-2") == {"w1": "mine", "w2": "other"}


def tokens(texts: Sequence[str]) -> np.ndarray:
    return np.array([[len(text), ord(text[-1])] for text in texts], np.int32).reshape(-1, 2)


def latents(dataset: Dataset, texts: dict[str, str], failed: tuple[str, ...] = ()) -> str:
    """A table as the encode job writes it."""
    rows = [
        {
            "id": id, "moments": b"" if id in failed else f"moments of {id}".encode(), "channels": 4, "height": 1, "width": 1,
            "caption": text, "token_ids": [] if id in failed else tokens([text])[0].tolist(),
            "status": "error" if id in failed else OK, "error": "bad" if id in failed else "",
        }
        for id, text in texts.items()
    ]  # fmt: skip
    return dataset.put_rows("latents/vae", rows, LATENTS)


def test_latents_that_say_what_the_texts_say_stay_as_they_are(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"a": "one", "b": "two"}
    path = latents(dataset, texts)
    monkeypatch.setattr(dataset.store, "write_bytes", lambda path, data: pytest.fail(f"{path} was written"))
    assert reworded(dataset, "latents/vae", [path], texts, tokens) == ((path,), 0)
    assert reworded(dataset, "latents/vae", [], texts, tokens) == ((), 0)


def test_latents_with_other_words_are_the_very_tables_of_an_encoding_with_those_words(dataset: Dataset) -> None:
    first = latents(dataset, {"a": "one", "b": "two", "c": "three", "bad": "four"}, failed=("bad",))
    second = latents(dataset, {"d": "five"})
    new = {"a": "one", "b": "a curator's words", "bad": "edited too", "d": "five"}
    tables, changed = reworded(dataset, "latents/vae", [first, second], new, tokens)
    expected = latents(dataset, {id: new[id] for id in ("a", "b", "bad")}, failed=("bad",))
    assert set(tables) == {expected, second}
    assert changed == 2
    assert first in dataset.store.list("latents")  # older versions name it
    assert reworded(dataset, "latents/vae", tables, {"d": "five"}, tokens) == ((second,), 0)


def test_rows_of_some_columns_are_rows_of_those_columns(collection: Dataset) -> None:
    paths = collection.latest().images
    assert list(collection.rows(paths, ["id", "width"])) == [
        {"id": row["id"], "width": row["width"]} for row in collection.rows(paths)
    ]


def test_re_captioning_rewrites_no_image_bytes(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [{**work(0).row(), "id": f"w{n:05}"} for n in range(10_000)]
    paths = [dataset.put_rows("images", works[n : n + 1000], IMAGES) for n in range(0, 10_000, 1000)]
    dataset.publish(dataset.latest().with_images(paths))
    add(dataset, [], [caption(row["id"]) for row in works])
    before, written = dataset.store.files("images"), []
    write = dataset.store.write_bytes
    monkeypatch.setattr(dataset.store, "write_bytes", lambda path, data: (written.append(path), write(path, data)))
    add(dataset, [], [caption(row["id"], f"anew: {row['id']}") for row in works], captioner="blip-2")
    assert [path.partition("/")[0] for path in written] == ["captions", "manifests", "refs", "refs"]
    assert dataset.store.files("images") == before
    assert replace(dataset.latest(), captions={}) == replace(dataset.read(dataset.published()[1]), captions={})
