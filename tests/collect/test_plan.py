from __future__ import annotations

import pytest

from momalisa.collect.plan import Plan
from momalisa.config import Collect
from momalisa.dataset import Place
from momalisa.records import Artwork

KNOWN = {"good": Place("t", True), "bad": Place("t", False)}
LISTED = ["good", "new", "bad", "newer"]


@pytest.mark.parametrize(
    ("options", "asked", "counts"),
    [
        ({}, ["new", "newer"], (4, 2, 1)),
        ({"refresh": True}, ["good", "new", "newer"], (4, 1, 0)),
        ({"retry_failed": True}, ["bad"], (2, 1, 1)),
        ({"retry_failed": True, "refresh": True}, ["bad"], (2, 1, 1)),
    ],
)
def test_which_works_are_asked_for(options: dict[str, bool], asked: list[str], counts: tuple[int, int, int]) -> None:
    plan = Plan(KNOWN, Collect.model_validate(options))
    assert [work.id for block in plan.blocks(Artwork(id) for id in LISTED) for work in block] == asked
    assert (plan.listed, plan.passed_by, plan.passed_by_ok) == counts


def test_what_counts_is_what_is_asked_for_now_or_was_by_the_run_that_was_interrupted() -> None:
    plan = Plan(KNOWN, Collect(), {"newer": Place("t", True)})
    assert [id for id in LISTED if plan.counts(id)] == ["new", "newer"]
    assert [work.id for block in plan.blocks(Artwork(id) for id in LISTED) for work in block] == ["new"]


def test_blocks_are_full_but_the_last_and_dealt_as_works_come_in() -> None:
    read: list[int] = []

    def works():  # type: ignore[no-untyped-def]
        for number in range(7):
            read.append(number)
            yield Artwork(str(number))

    blocks = Plan({}, Collect(block_size=3)).blocks(works())
    assert [work.id for work in next(blocks)] == ["0", "1", "2"]
    assert read == [0, 1, 2]
    assert [len(block) for block in blocks] == [3, 1]
