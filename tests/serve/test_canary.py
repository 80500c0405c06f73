"""The laws of a trial: an even share that begins at once, time and pictures, and times that are compared like with like."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.canary import ENOUGH_PICTURES, ENOUGH_TICKS, SLOWER, Canary


@given(st.integers(0, 1000).map(lambda thousandths: thousandths / 1000), st.integers(1, 300))
def test_the_first_task_is_the_new_ones_and_the_others_are_evenly_spread(share: float, tasks: int) -> None:
    canary = Canary(share, 0)
    new = [canary.next_is_new() for _ in range(tasks)]
    exact = Fraction(str(share))
    assert new[0] is (share > 0)
    for end in range(1, tasks + 1):
        assert sum(new[:end]) == math.ceil(end * exact)


def test_five_percent_of_a_thousand_tasks_are_fifty() -> None:
    canary = Canary(0.05, 0)
    assert [task for task in range(1000) if canary.next_is_new()] == list(range(0, 1000, 20))


def test_it_passes_when_time_is_over_and_pictures_have_come_and_none_was_bad() -> None:
    canary = Canary(0.05, ends_at=60)
    assert (canary.passed(61), canary.rehearses(True, 1), canary.rehearses(False, 1)) == (False, True, False)
    assert canary.rehearses(False, 60)
    canary.pictures = ENOUGH_PICTURES
    assert (canary.passed(59), canary.passed(60), canary.rehearses(True, 61)) == (False, True, False)
    canary.fail("black")
    canary.fail("later")
    assert (canary.passed(60), canary.problem, canary.rehearses(True, 61)) == (False, "black", False)


def test_who_has_failed_is_not_withdrawn() -> None:
    failed, withdrawn = Canary(0.05, 60), Canary(0.05, 60)
    failed.fail("black")
    for canary in (failed, withdrawn):
        canary.withdraw("refs/best has moved")
    withdrawn.fail("black")
    assert (failed.withdrawn, failed.problem) == (False, "black")
    assert (withdrawn.withdrawn, withdrawn.problem) == (True, "refs/best has moved")


@pytest.mark.parametrize(
    ("size_px", "rows", "times", "fails"),
    [
        (512, 8, SLOWER + 0.1, True),
        (512, 8, SLOWER - 0.1, False),
        (512, 2, SLOWER + 0.1, True),  # slower with fewer rows than the old one had
        (512, 16, 100, False),  # more rows than the old one had: nothing to compare with
        (1024, 8, 100, False),  # another size
    ],
)
def test_ticks_are_compared_with_those_of_the_same_size_and_no_fewer_rows(
    size_px: int, rows: int, times: float, fails: bool
) -> None:
    canary = Canary(0.05, 60)
    for _ in range(ENOUGH_TICKS):
        canary.note_tick(False, 512, 8, 0.1)
        canary.note_tick(False, 512, 1, 0.01)
    for _ in range(ENOUGH_TICKS - 1):
        canary.note_tick(True, size_px, rows, 0.1 * times)
    assert not canary.problem
    canary.note_tick(True, size_px, rows, 0.1 * times)
    assert ("s a step" in canary.problem) is fails


def test_a_few_slow_ticks_are_no_slow_checkpoint() -> None:
    canary = Canary(0.05, 60)
    for number in range(100):
        canary.note_tick(False, 512, 2, 0.1)
        canary.note_tick(True, 512, 2, 0.1 if number % 3 else 5.0)
    assert not canary.problem
