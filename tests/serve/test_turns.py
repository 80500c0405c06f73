"""The law of coming back: nobody before there is room, no more at once than can be drawn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.turns import MAX_S, Turns

SECONDS = st.floats(0, 200, allow_nan=False)
REFUSALS = st.lists(st.tuples(st.floats(0, 5), SECONDS, st.floats(0, 40)), min_size=1, max_size=60)


@given(REFUSALS)
def test_what_comes_back_within_a_time_can_be_drawn_in_it(refusals: list[tuple[float, float, float]]) -> None:
    """(seconds since the refusal before, seconds until there is room, seconds of work)"""
    turns, now, back = Turns(), 0.0, []
    for passed, room_in_s, work_s in refusals:
        now += passed
        wait = turns.take(now, room_in_s, work_s)
        assert 1 <= wait <= MAX_S
        assert wait >= min(room_in_s, MAX_S)
        if wait < MAX_S:
            back.append((now + wait, work_s))
    for end, _ in back:
        assert sum(work_s for at, work_s in back if at <= end) <= end + 1e-6


@given(st.lists(st.floats(0.01, 40), min_size=2, max_size=60), SECONDS)
def test_the_later_in_a_crowd_the_later_they_come_back(works: list[float], room_in_s: float) -> None:
    turns = Turns()
    waits = [turns.take(0.0, room_in_s, work_s) for work_s in works]
    assert waits == sorted(waits)


@given(SECONDS, SECONDS, st.floats(0, 40))
def test_the_further_over_the_limit_the_later(one: float, other: float, work_s: float) -> None:
    nearer, further = (Turns().take(0.0, room_in_s, work_s) for room_in_s in sorted((one, other)))
    assert nearer <= further


def test_a_crowd_is_spread_and_forgotten() -> None:
    turns = Turns()
    assert [turns.take(0.0, 0.5, 2.0) for _ in range(5)] == [2, 4, 6, 8, 10]
    assert turns.take(4.0, 0.5, 2.0) == 8  # four of those seconds have passed
    assert turns.take(100.0, 0.5, 2.0) == 2
    assert [Turns().take(0.0, 500.0, 1.0), turns.take(100.0, 0.0, 1e9), turns.take(100.0, 0.0, 1.0)] == [MAX_S] * 3
