"""The line: batches, limits, leaving, and failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from serve.batcher import Batcher
from serve.work import Busy, Commission, Failed, Outcome, Painted


def order(name: str, pictures: int = 1, steps: int = 1) -> Commission:
    return Commission(name, tuple(range(pictures)), steps, 1.0, 64)


class Painter:
    """Notes each batch; the first one waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.started, self.go = threading.Event(), threading.Event()

    def __call__(self, commissions: Sequence[Commission]) -> list[Outcome]:
        self.batches.append([commission.prompt for commission in commissions])
        self.started.set()
        assert self.go.wait(10)
        if any(commission.prompt == "bad" for commission in commissions):
            raise ArithmeticError("NaN")
        return [Painted((b"",) * len(commission.seeds), commission.prompt) for commission in commissions]


async def behind_a_first(batcher: Batcher, painter: Painter, *orders: Commission) -> list[asyncio.Task[Outcome]]:
    """Submit one commission, wait until it is being painted, then submit the others."""
    tasks = [asyncio.create_task(batcher.submit(order("first")))]
    await asyncio.to_thread(painter.started.wait, 10)
    tasks += [asyncio.create_task(batcher.submit(one)) for one in orders]
    await asyncio.sleep(0)
    return tasks


async def test_what_waits_is_painted_together_by_kind_and_up_to_the_limit() -> None:
    painter = Painter()
    batcher = Batcher(painter, max_batch=3, max_waiting=10)
    tasks = await behind_a_first(batcher, painter, order("a"), order("slow", steps=9), order("b", 3), order("c", 2), order("d"))
    painter.go.set()
    outcomes = await asyncio.gather(*tasks)
    assert painter.batches == [["first"], ["a", "c"], ["slow"], ["b"], ["d"]]
    assert [outcome.checkpoint for outcome in outcomes if isinstance(outcome, Painted)] == ["first", "a", "slow", "b", "c", "d"]
    batcher.close()


async def test_a_full_line_turns_away_at_once_and_opens_again() -> None:
    painter = Painter()
    batcher = Batcher(painter, max_batch=1, max_waiting=1)
    tasks = await behind_a_first(batcher, painter, order("a"))
    turned_away = await batcher.submit(order("b"))
    assert isinstance(turned_away, Busy)
    assert turned_away.retry_after_s >= 1
    painter.go.set()
    await asyncio.gather(*tasks)
    assert isinstance(await batcher.submit(order("c")), Painted)
    batcher.close()


async def test_who_leaves_the_line_costs_nothing() -> None:
    painter = Painter()
    batcher = Batcher(painter, max_batch=1, max_waiting=1)
    first, leaving = await behind_a_first(batcher, painter, order("leaving"))
    leaving.cancel()
    await asyncio.wait([leaving])
    staying = asyncio.create_task(batcher.submit(order("staying")))
    painter.go.set()
    await asyncio.gather(first, staying)
    assert painter.batches == [["first"], ["staying"]]
    batcher.close()


async def test_a_bad_commission_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    painter = Painter()
    batcher = Batcher(painter, max_batch=8, max_waiting=10)
    tasks = await behind_a_first(batcher, painter, order("a"), order("bad"), order("b"))
    painter.go.set()
    kinds = [type(outcome) for outcome in await asyncio.gather(*tasks)]
    assert kinds == [Painted, Painted, Failed, Painted]
    assert "painting 3 commissions failed" in caplog.text
    batcher.close()
