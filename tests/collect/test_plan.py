from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from momalisa.collect.plan import Plan
from momalisa.config import Collect
from momalisa.dataset import Place
from momalisa.records import REJECTED, TOLD, Artwork

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


ONCE = ("same", "retold", "untold", "moved", "gone", "bad")  # works that were collected


def place(ok: bool, work: Artwork) -> Place:
    return Place("t", ok, hash(tuple(getattr(work, name) for name in TOLD)), hash(work.image_url))


@pytest.mark.parametrize(
    ("options", "dealt", "asked"),
    [
        ({}, ["retold", "moved", "bad", "new"], ["moved", "bad", "new"]),
        (
            {"refresh": True},
            ["same", "retold", "untold", "moved", "gone", "bad", "new"],
            ["same", "retold", "untold", "moved", "gone", "bad", "new"],
        ),
        ({"retry_failed": True}, ["bad"], ["bad"]),
        ({"source": {"kind": "folder", "location": "elsewhere"}}, ["retold", "new"], ["new"]),  # moved ones may be other works
    ],
)
def test_what_the_source_tells_otherwise_is_dealt_and_asked_for_only_where_it_has_moved(
    options: dict[str, Any], dealt: list[str], asked: list[str]
) -> None:
    before = [Artwork(id, "", title="Sea", image_url=id) for id in ONCE]
    known = {work.id: place(work.id != "bad", work) for work in before}
    now = {work.id: work for work in before} | {"new": Artwork("new", "")}
    now["retold"] = replace(now["retold"], credit="Gift of Ann")
    now["untold"] = replace(now["untold"], title="")
    now["gone"] = replace(now["gone"], status=REJECTED, image_url="")  # it has no picture any more: the one that is there stays
    now |= {id: replace(now[id], image_url="elsewhere", title="Lake") for id in ("moved", "bad")}
    plan = Plan(known, Collect.model_validate(options))
    found = [work for block in plan.blocks(now.values()) for work in block]
    assert [work.id for work in found] == dealt
    assert [work.id for work in found if plan.asks(work)] == asked
    assert plan.listed == len(found) + plan.passed_by
    assert plan.unforeseen == len(found) - sum(plan.counts(work.id) for work in found)


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
