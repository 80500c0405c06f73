"""Who may wait: the bounds of the line and of a key, and what an edit's work is."""

from __future__ import annotations

from typing import Any

import pytest

from momalisa.config import Serve
from serve.admission import Admission
from serve.mailbox import Mailbox
from serve.meters import Meters
from serve.sample import ActiveTask
from serve.task import GenerationTask, Rejected, Waiting

LIMITS = Serve(max_pictures_per_request=2, max_waiting_rows=10, max_waiting_rows_per_key=4)


def task_of(pictures: int, key: str = "", **more: Any) -> ActiveTask:
    task = GenerationTask("x", tuple(range(pictures)), more.pop("steps", 20), 1.0, 16, key=key, **more)
    return ActiveTask(task, [], Mailbox(), 0.0)


async def test_a_key_is_full_before_the_line_is() -> None:
    admission = Admission(LIMITS, Meters())
    answers = [admission.admit(task_of(2, key), 0) for key in ("a", "a", "a", "b", "b", "c", "d")]
    assert [type(answer) for answer in answers] == [Waiting, Waiting, Rejected, Waiting, Waiting, Waiting, Rejected]
    assert isinstance(admission.admit(task_of(2, "d", kiosk=True), 0), Waiting)  # the line's bound is the visitors'
    assert len(admission) == 12


@pytest.mark.parametrize(("strength", "mask", "steps"), [(0.5, None, 10), (0.05, None, 1), (1.0, b"", 20)])
async def test_an_edit_pays_for_the_steps_that_are_done(strength: float, mask: bytes | None, steps: int) -> None:
    admission = Admission(LIMITS, Meters())
    place = admission.admit(task_of(1, image=b"", mask=mask, strength=strength), 0)
    assert admission.row_steps == steps
    assert isinstance(place, Waiting)
    assert place.eta_s == pytest.approx(round(steps * admission.pace.row_step_s, 1))


async def test_an_edit_at_a_tier_pays_for_both() -> None:
    admission = Admission(LIMITS, Meters())
    admission.admit(task_of(1, image=b"", strength=0.5, tier="draft"), 0)
    assert admission.row_steps == 6
