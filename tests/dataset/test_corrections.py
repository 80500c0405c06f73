"""What is told otherwise of works whose pictures stay: their tables hold the new words beside the same pictures."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

from momalisa.dataset import Dataset
from momalisa.dataset.corrections import Corrections
from momalisa.records import CORRECTIONS, IMAGES, Artwork
from tests.dataset.conftest import work


def corrections(*tables: list[Artwork]) -> Corrections:
    return Corrections(pa.Table.from_pylist([one.row() for one in works], schema=CORRECTIONS) for works in tables)


def put(dataset: Dataset, works: list[Artwork]) -> str:
    return dataset.put_rows("images", [one.row() for one in works], IMAGES)


def test_a_corrected_table_is_the_very_one_of_works_that_were_always_told_so(dataset: Dataset) -> None:
    works = [work(number) for number in range(6)]
    now = [replace(one, credit="Gift of Ann", image_url=f"https://a.example/{one.id}") for one in works]
    path = put(dataset, works)
    made = corrections([now[4]], [now[1], work(9)]).made(dataset.store.get_table(path))
    right = put(dataset, [now[number] if number in (1, 4) else one for number, one in enumerate(works)])
    assert dataset.store.put_table("images", made) == right != path


def test_a_picture_that_is_another_one_by_now_stays(dataset: Dataset) -> None:
    path = put(dataset, [work(1, bytes=b"new", width=9)])
    told = corrections([work(1, title="Right", bytes=b"old", width=5)])
    (row,) = told.made(dataset.store.get_table(path)).to_pylist()
    assert (row["title"], row["bytes"], row["width"]) == ("Right", b"new", 9)


def test_a_table_without_corrected_works_is_what_it_was(dataset: Dataset) -> None:
    table = dataset.store.get_table(put(dataset, [work(1)]))
    assert Corrections().made(table) == corrections([work(2)]).made(table) == table


def test_works_are_corrected_where_they_are_and_others_leave(dataset: Dataset) -> None:
    paths = [put(dataset, [work(number), work(number + 1)]) for number in (0, 2, 4)]
    version = replace(dataset.latest(), images=tuple(paths))
    changed, copies = dataset.without_works(version, {"w1", "w2"}, frozenset(), corrections([work(1, title="Right")]))
    assert copies.keys() == {*paths[:2]}
    titles = [[(row["id"], row["title"]) for row in dataset.rows([copies[path]])] for path in paths[:2]]
    assert titles == [[("w0", "Work 0"), ("w1", "Right")], [("w3", "Work 3")]]
    assert set(changed.images) == {*copies.values(), paths[2]}


def test_each_table_is_read_whole_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [put(dataset, [work(number), work(number + 1)]) for number in (0, 2, 4)]
    get, read = dataset.store.get_table, []
    monkeypatch.setattr(dataset.store, "get_table", lambda path: (read.append(path), get(path))[1])
    told = corrections(*([work(number, title="Right")] for number in (5, 0, 3, 1)))
    dataset.without_works(replace(dataset.latest(), images=tuple(paths)), {"w0", "w1", "w3", "w5"}, frozenset(), told)
    assert sorted(read) == sorted(paths)
