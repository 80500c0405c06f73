"""What an unfinished stage has stored is remembered, and belongs to what it began from."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from momalisa.dataset import Dataset
from momalisa.dataset.draft import Draft, Entry


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(str(tmp_path))


def test_entries_come_back_in_order_until_they_are_cleared(dataset: Dataset) -> None:
    draft = Draft(dataset.store, "collect", "abc")
    entries = [Entry("images/2.parquet", ("y", "x"), ("y",)), Entry("images/1.parquet")]
    for entry in entries:
        draft.add(entry)
    draft.add(entries[0])  # a block that was done twice
    again = Draft(dataset.store, "collect", "abc")
    assert again.entries() == [Entry("images/1.parquet"), Entry("images/2.parquet", ("x", "y"), ("y",))]
    again.clear()
    assert draft.entries() == []


def test_a_dropped_table_is_made_again_and_the_others_are_not(dataset: Dataset) -> None:
    draft = Draft(dataset.store, "collect", "abc")
    for number in range(3):
        draft.add(Entry(f"images/{number}.parquet"))
    draft.drop(["images/0.parquet", "images/2.parquet", "images/never-there.parquet"])
    assert draft.entries() == [Entry("images/1.parquet")]


def test_another_origin_or_stage_has_a_draft_of_its_own(dataset: Dataset) -> None:
    Draft(dataset.store, "collect", "abc").add(Entry("images/1.parquet"))
    assert Draft(dataset.store, "collect", "abd").entries() == []
    assert Draft(dataset.store, "captions-x", "abc").entries() == []


@pytest.mark.parametrize("operation", ["read_json", "delete"])
def test_a_bucket_s_files_are_asked_for_side_by_side(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    draft = Draft(dataset.store, "collect", "abc")
    entries = [Entry(f"images/{number}.parquet") for number in range(8)]
    for entry in entries:
        draft.add(entry)
    together, one = threading.Barrier(4, timeout=20), getattr(dataset.store, operation)

    def slow(path: str) -> Any:
        together.wait()  # for three more
        return one(path)

    monkeypatch.setattr(dataset.store, operation, slow)
    assert draft.entries() == entries
    draft.clear()
    assert not dataset.store.list("drafts")
