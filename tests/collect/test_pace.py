"""Caps hold over all workers, whatever each of them does."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from momalisa.collect.pace import Pace, Share


@settings(deadline=None)
@given(workers=st.integers(1, 40), connections=st.integers(1, 40))
def test_shares_add_up_to_the_connections_of_a_host(workers: int, connections: int) -> None:
    shares = Share.among(workers, connections)
    assert sum(share.connections for share in shares) == connections
    assert all(share.connections >= 1 for share in shares)
    assert len(shares) == min(workers, connections)
    assert [share.index for share in shares] == list(range(len(shares)))


@settings(max_examples=300, deadline=None)
@given(
    of=st.integers(1, 8),
    interval_s=st.sampled_from([0.01, 0.1, 1 / 3, 1.0, 10.0]),
    starts=st.lists(st.floats(1.7e9, 1.7e9 + 60), min_size=8, max_size=8),
)
def test_the_turns_of_all_workers_are_an_interval_apart(of: int, interval_s: float, starts: list[float]) -> None:
    turns = []
    for index in range(of):
        at, share = starts[index], Share(1, index, of)
        for _ in range(5):
            later = share.next_turn(at, interval_s)
            assert at < later <= at + of * interval_s * 1.001 + 3e-6
            turns.append(later)
            at = later
    turns.sort()
    assert all(b - a > 0.999 * interval_s - 3e-6 for a, b in pairwise(turns))


def test_a_worker_waits_for_each_turn_and_for_as_long_as_the_host_asked() -> None:
    async def three(rest_s: float) -> list[float]:
        pace, times = Pace(Share(3)), []
        pace.rest(time.time() + rest_s)

        async def one() -> None:
            await pace.turn(0.05)
            times.append(time.time())

        await asyncio.gather(one(), one(), one())
        return times

    began = time.time()
    first, second, third = asyncio.run(three(0.2))
    assert first - began >= 0.2
    assert second - began >= 0.24
    assert third - began >= 0.29


def test_a_host_that_asks_for_a_rest_while_a_turn_is_waited_for_gets_it() -> None:
    async def one() -> float:
        pace = Pace(Share(1))
        waiting = asyncio.create_task(pace.turn(0.2))
        await asyncio.sleep(0.01)
        pace.rest(until := time.time() + 0.5)
        await waiting
        return time.time() - until

    assert asyncio.run(one()) >= -0.01


def test_a_turn_is_used_once_even_if_the_clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(round(seconds, 3))

    async def three() -> None:
        pace = Pace(Share(1, 1, 2))
        for _ in range(3):
            await pace.turn(1.0)

    monkeypatch.setattr(time, "time", lambda: 1000.25)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(three())
    assert slept == [0.75, 2.75, 4.75]
