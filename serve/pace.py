"""How fast a generator paints, measured from its ticks: what waiting times are computed from."""

from __future__ import annotations

FORGET = 0.95  # what a tick keeps of those before it: about the last twenty count
FIRST_GUESS_S = 0.05  # a row-step, before anything was measured


class Pace:
    """Seconds per row-step, a decaying mean over the rows of recent ticks."""

    def __init__(self) -> None:
        self._seconds, self._rows = 0.0, 0.0

    def tick(self, seconds: float, rows: int) -> None:
        """One tick of `rows` rows took so long; one of no rows only decoded, which is part of the work of those before."""
        keep = FORGET if rows > 0 else 1.0
        self._seconds = keep * self._seconds + (seconds if self._rows or rows > 0 else 0.0)
        self._rows = keep * self._rows + max(0, rows)

    @property
    def row_step_s(self) -> float:
        return self._seconds / self._rows if self._rows else FIRST_GUESS_S

    def eta_s(self, row_steps: float) -> float:
        """When so much work, this request's own included, will be done."""
        return row_steps * self.row_step_s
