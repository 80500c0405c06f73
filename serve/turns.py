"""When those who were refused should come back: each refusal takes a turn behind those before it.

A virtual clock, as in the generic cell rate algorithm (ITU-T I.371): every refusal moves it on by the time that its own
work will take, and real time catches up with it. So a crowd is told different times, as far apart as its pictures take to
draw, and what was told to come back within t seconds can be drawn in t seconds.
"""

from __future__ import annotations

import math

MAX_S = 120  # nobody is sent away for longer; those who are told this have no turn of their own


class Turns:
    """Plain data: whoever shares it locks it."""

    def __init__(self) -> None:
        self._taken_until = -math.inf

    def take(self, now: float, room_in_s: float, work_s: float) -> int:
        """Whole seconds from `now`: not before there is room, and not before all that were refused earlier had their turn."""
        self._taken_until = min(max(now, self._taken_until) + work_s, now + MAX_S)
        return max(1, min(MAX_S, math.ceil(max(room_in_s, self._taken_until - now))))
