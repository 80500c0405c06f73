"""Whether a newly promoted checkpoint may have every request: it first gets a share, and is compared with the old one.

It fails at the first picture that is none (NaN, or one flat colour: weights do that, words do not), and when its ticks
take `SLOWER` times as long as the old one's of the same size and of no fewer rows. What is compared is the model's steps,
not a visitor's whole wait: adapters are loaded and pictures decoded at no fault of the weights.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction

SLOWER = 2.0
ENOUGH_TICKS = 20  # of each, before times are compared
ENOUGH_PICTURES = 5  # before it may pass


def _recent() -> dict[bool, deque[tuple[int, int, float]]]:
    return {new: deque(maxlen=200) for new in (True, False)}


@dataclass
class Canary:
    """`share` of the tasks until `ends_at` seconds on the caller's clock, and until `wanted` pictures have come."""

    share: float
    ends_at: float
    wanted: int = ENOUGH_PICTURES
    problem: str = ""
    withdrawn: bool = False  # refs/best moved on: the problem is not the checkpoint's
    pictures: int = 0
    _tasks: int = 0
    _ticks: dict[bool, deque[tuple[int, int, float]]] = field(default_factory=_recent)  # by new: size, rows, seconds

    def next_is_new(self) -> bool:
        """Whether the next task goes to the new checkpoint: the first, and then evenly spread, not by chance."""
        share = Fraction(str(self.share))
        self._tasks += 1
        return math.ceil(self._tasks * share) > math.ceil((self._tasks - 1) * share)

    def note_tick(self, new: bool, size_px: int, rows: int, seconds: float) -> None:
        """A tick of so many rows of the UNet's batch took so long."""
        self._ticks[new].append((size_px, rows, seconds))
        young = [s for size, height, s in self._ticks[True] if (size, height) == (size_px, rows)]
        old = [s for size, height, s in self._ticks[False] if size == size_px and height >= rows]
        if min(len(old), len(young)) >= ENOUGH_TICKS and statistics.median(young) > SLOWER * statistics.median(old):
            self.fail(f"{statistics.median(young):.3f} s a step, {statistics.median(old):.3f} s before")

    def fail(self, problem: str) -> None:
        self.problem = self.problem or problem

    def withdraw(self, reason: str) -> None:
        """End it for a reason that is not the checkpoint's; one that has failed has failed."""
        self.withdrawn = self.withdrawn or not self.problem
        self.fail(reason)

    def rehearses(self, idle: bool, now: float) -> bool:
        """Whether the new checkpoint is to paint for nobody: no visitors come, or too few of theirs were its pictures."""
        return not self.problem and self.pictures < self.wanted and (idle or now >= self.ends_at)

    def passed(self, now: float) -> bool:
        return not self.problem and now >= self.ends_at and self.pictures >= self.wanted
