"""Who may wait, who is next, and how long it will take: the queue in front of the engine, and the measured pace.

Plain data: the scheduler locks it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from momalisa.config import Serve
from serve.fair_queue import FairQueue
from serve.meters import Meters
from serve.pace import Pace
from serve.sample import ActiveTask, Sample, samples_of
from serve.task import Rejected, Waiting
from serve.turns import Turns


class Admission:
    """`running`, in its methods: the samples that are being drawn; `at_work`: the row-steps that are left of them."""

    def __init__(self, limits: Serve, meters: Meters) -> None:
        self._meters = meters
        self.pace, self._turns = Pace(), Turns()
        self._queue: FairQueue[Sample] = FairQueue(limits.max_waiting_rows, limits.max_waiting_rows_per_key)
        self._requeued: deque[Sample] = deque()  # taken from a checkpoint that failed: they go first

    def __len__(self) -> int:
        """Pictures in line."""
        return len(self._queue)

    @property
    def row_steps(self) -> int:
        """Work that waits."""
        return self._queue.row_steps + sum(sample.row_steps for sample in self._requeued)

    def admit(self, active: ActiveTask, at_work: int) -> Waiting | Rejected:
        """Its samples wait from now on, or the task is told when to come back."""
        task = active.task
        excess = self._queue.excess(task.key, task.rows * len(task.seeds), task.kiosk)
        active.samples = samples_of(active)
        if excess > 0:
            mean_steps = self._queue.row_steps / max(1, self._queue.rows)
            room_in_s = self.pace.eta_s(excess * mean_steps)
            return self._refuse(active, "line_full", room_in_s, f"{len(self)} pictures are waiting already")
        for sample in active.samples:
            self._queue.add(sample)
        place = self.places((), at_work)[active]
        if place.eta_s > task.deadline_s:
            message = f"it would take about {place.eta_s:.0f} s, and deadline_s is {task.deadline_s:.0f}"
            return self._refuse(active, "deadline", place.eta_s - task.deadline_s, message)
        return place

    def _refuse(self, active: ActiveTask, reason: str, room_in_s: float, message: str) -> Rejected:
        self._meters.refused.labels(reason).inc()
        self.remove(active)
        work_s = self.pace.eta_s(sum(sample.row_steps for sample in active.samples))
        active.samples = []
        return Rejected(self._turns.take(active.entered_at, room_in_s, work_s), message)

    def next(self, free_rows: int) -> Sample | None:
        """Who is to be drawn now."""
        return self._requeued.popleft() if self._requeued else self._queue.take(free_rows)

    def requeue(self, sample: Sample) -> None:
        self._requeued.append(sample)

    def remove(self, active: ActiveTask) -> None:
        """None of its samples waits any more."""
        for sample in active.samples:
            self._queue.remove(sample)
        self._requeued = deque(sample for sample in self._requeued if sample.active is not active)

    def places(self, running: Iterable[Sample], at_work: int) -> dict[ActiveTask, Waiting]:
        """Where everybody is, and when their last picture will be done."""
        soon = Waiting(0, round(self.pace.eta_s(at_work), 1))
        places = {sample.active: soon for sample in running}
        work, before, positions = at_work, 0, dict[ActiveTask, int]()
        for sample in [*self._requeued, *self._queue.order()]:
            work += sample.row_steps
            if sample.active not in places:
                before += 1
                positions[sample.active] = before
            places[sample.active] = Waiting(positions.get(sample.active, 0), round(self.pace.eta_s(work), 1))
        return places
