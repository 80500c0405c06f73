"""What the scheduler keeps of a task from its acceptance to its outcome: the task, and one sample for each picture.

Changed under the scheduler's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from momalisa.engine.request import steps_on_image
from momalisa.engine.tiers import steps_at
from serve.fair_queue import QueueItem
from serve.mailbox import Mailbox
from serve.task import GenerationTask

if TYPE_CHECKING:
    from momalisa.engine import Request
    from serve.loaded_checkpoint import LoadedCheckpoint

MAX_TICKS = 1000  # of a trace


@dataclass(eq=False)
class ActiveTask:
    """A task that was accepted. `checkpoint`: the weights that its first sample began with, and all others get."""

    task: GenerationTask
    requests: Sequence[Request]  # one for each seed
    mailbox: Mailbox
    entered_at: float
    samples: list[Sample] = field(default_factory=list)  # those that are not done
    checkpoint: LoadedCheckpoint | None = None
    closed: bool = False
    previewed: bool = False
    ticks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def late_at(self) -> float:
        return self.entered_at + self.task.deadline_s

    def note_tick(self, started: float, seconds: float, rows: int, checkpoint: str) -> None:
        """Keep one tick of the engine for the task's trace."""
        if len(self.ticks) < MAX_TICKS:
            at_s = round(started - self.entered_at, 4)
            self.ticks.append({"at_s": at_s, "seconds": round(seconds, 4), "rows": rows, "checkpoint": checkpoint})


@dataclass(eq=False)
class Sample(QueueItem):
    """One picture of a task: in line, in an engine's batch, or being finished."""

    active: ActiveTask = field(kw_only=True)
    index: int = field(kw_only=True)
    checkpoint: LoadedCheckpoint | None = None
    id: int = -1  # the engine's
    repeated: bool = False  # another checkpoint failed to draw it

    def again(self) -> Sample:
        """The same picture, to be drawn anew, in this one's place."""
        anew = replace(self, checkpoint=None, id=-1, repeated=True)
        self.active.samples = [anew if other is self else other for other in self.active.samples]
        return anew


def samples_of(active: ActiveTask) -> list[Sample]:
    """All pictures of a task, with the steps that are done: its tier's, and of an edit those on top of the image."""
    task, steps = active.task, steps_at(active.task.steps, active.task.tier)
    steps = steps if task.image is None else steps_on_image(steps, task.strength)
    return [Sample(task.key, task.rows, steps, task.kiosk, active=active, index=n) for n in range(len(task.seeds))]
