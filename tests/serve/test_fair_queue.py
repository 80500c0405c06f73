"""The laws of the line: bounded, fair among keys, a lane for the kiosk, nobody lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serve.fair_queue import KIOSK_RUN, FairQueue, QueueItem

ITEMS = st.builds(QueueItem, st.sampled_from("abc"), st.sampled_from([1, 2]), st.integers(1, 50))


def line_of(places: list[QueueItem]) -> FairQueue[QueueItem]:
    line: FairQueue[QueueItem] = FairQueue(10_000, 10_000)
    for place in places:
        line.add(place)
    return line


def drained(line: FairQueue[QueueItem]) -> list[QueueItem]:
    taken = []
    while (place := line.take(2)) is not None:
        taken.append(place)
    return taken


@given(st.lists(ITEMS, max_size=40))
def test_keys_with_work_get_equal_work_up_to_a_picture_of_each(places: list[QueueItem]) -> None:
    line = line_of(places)
    left, work = Counter(place.key for place in places), Counter[str]()
    largest = {key: max((p.row_steps for p in places if p.key == key), default=0) for key in "abc"}
    for place in drained(line):
        work[place.key] += place.row_steps
        left[place.key] -= 1
        busy = [key for key in left if left[key] > 0 and Counter(p.key for p in places)[key] > 0]
        for one in busy:
            for other in busy:
                assert work[one] - work[other] <= largest[one] + largest[other]


@given(st.lists(ITEMS, max_size=40), st.lists(st.integers(0, 39), max_size=20))
def test_the_order_that_is_told_is_the_order_that_happens_and_nobody_is_lost(places: list[QueueItem], leaving: list[int]) -> None:
    line = line_of(places)
    for index in leaving:
        if index < len(places):
            line.remove(places[index])
    left = [place for index, place in enumerate(places) if index not in leaving]
    assert line.rows == sum(place.rows for place in left)
    assert line.row_steps == sum(place.row_steps for place in left)
    told = line.order()
    assert drained(line) == told
    assert sorted(map(id, told)) == sorted(map(id, left))
    assert (len(line), line.rows, line.row_steps, line.rows_by_key) == (0, 0, 0, {})


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("ab")), max_size=40))
def test_the_kiosk_goes_first_but_not_alone(asked: list[tuple[bool, str]]) -> None:
    line = line_of([QueueItem("kiosk" if kiosk else key, 1, 5, kiosk) for kiosk, key in asked])
    order = line.order()
    taken = drained(line)
    assert taken == order
    run = 0
    for index, place in enumerate(taken):
        visitors_wait = any(not later.kiosk for later in taken[index:])
        kiosk_waits = any(later.kiosk for later in taken[index:])
        if place.kiosk and visitors_wait:
            assert run < KIOSK_RUN
        if not place.kiosk and kiosk_waits:
            assert run == KIOSK_RUN
        run = run + 1 if place.kiosk else 0


def test_a_key_of_its_own_order_is_kept_and_a_newcomer_does_not_wait_behind_a_crowd() -> None:
    crowd = [QueueItem("crowd", 2, 20) for _ in range(10)]
    line = line_of(crowd)
    assert line.take(2) is crowd[0]
    newcomer = QueueItem("newcomer", 2, 20)
    line.add(newcomer)
    assert line.order()[:2] == [newcomer, crowd[1]]


def test_who_was_away_has_saved_nothing_up() -> None:
    line = line_of([QueueItem("busy", 1, 10) for _ in range(20)])
    for _ in range(10):
        line.take(2)
    for _ in range(5):
        line.add(QueueItem("idle", 1, 10))
    assert [place.key for place in line.order()[:6]].count("idle") <= 4


def test_leaving_costs_nothing() -> None:
    """A key that asks and cancels is not put behind for work it never got."""
    line = line_of([QueueItem("b", 1, 10), QueueItem("b", 1, 10)])
    for _ in range(5):
        gone = QueueItem("a", 1, 100)
        line.add(gone)
        line.remove(gone)
        line.remove(gone)  # twice is once
    line.add(QueueItem("a", 1, 10))
    assert "a" in [place.key for place in line.order()[:2]]


def test_a_large_picture_is_waited_for() -> None:
    line = line_of([QueueItem("a", 2, 5), QueueItem("b", 1, 5)])
    assert line.take(1) is None
    assert [line.take(2).rows, line.take(1).rows] == [2, 1]  # type: ignore[union-attr]


def test_bounds_of_the_line_and_of_a_key() -> None:
    line: FairQueue[QueueItem] = FairQueue(max_rows=10, max_rows_per_key=6)
    for key, rows in (("a", 2), ("a", 2), ("b", 2), ("c", 2)):
        assert line.excess(key, rows) <= 0
        line.add(QueueItem(key, rows, 5))
    assert line.excess("d", 4) == 2
    assert line.excess("a", 4) == 2
    assert line.excess("kiosk", 6, kiosk=True) == 0  # the line's bound is the visitors'
    assert line.excess("kiosk", 8, kiosk=True) == 2
