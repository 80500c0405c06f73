"""Whether a newly promoted checkpoint may have every request: it first gets a share, and is compared with the old one.

It fails at the first picture that is none (NaN, or one flat colour: weights do that, words do not), and when its
pictures take `SLOWER` times as long a step as the old one's.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

SLOWER = 2.0
ENOUGH = 5  # pictures of each, before times are compared


@dataclass
class Canary:
    """`share` of the tasks until `ends_at` seconds on the caller's clock."""

    share: float
    ends_at: float
    problem: str = ""
    pictures: int = 0
    _due: float = 0.0
    _step_s: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def next_is_new(self) -> bool:
        """Whether the next task goes to the new checkpoint: evenly spread, not by chance."""
        self._due += self.share
        if self._due < 1:
            return False
        self._due -= 1
        return True

    def note_picture(self, new: bool, step_s: float) -> None:
        """A picture came, after so many seconds a step."""
        self.pictures += new
        times = self._step_s[new]
        times.append(step_s)
        del times[:-100]
        old, young = self._step_s[False], self._step_s[True]
        if min(len(old), len(young)) >= ENOUGH and statistics.median(young) > SLOWER * statistics.median(old):
            self.fail(f"{statistics.median(young):.3f} s a step, {statistics.median(old):.3f} s before")

    def fail(self, problem: str) -> None:
        self.problem = self.problem or problem

    def passed(self, now: float) -> bool:
        return not self.problem and now >= self.ends_at
