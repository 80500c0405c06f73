"""How fast a host is asked: its connections and its turns, shared out so that the caps hold over all workers.

Time is cut into ticks of `interval_s` since the epoch. Of `of` workers, the one with number `index` sends a request only
at ticks whose number leaves the remainder `index`, one a tick: together they never send more than one request a tick, and
no worker needs to ask another. (Machines' clocks need to agree to a fraction of the interval for the spacing to be even;
the rate holds in any case.)
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass

CLOCK_S = 1e-6  # floats hold the time since the epoch to a quarter of this: what is nearer to a turn is at that turn


@dataclass(frozen=True)
class Share:
    """One worker's part of what may be asked of each host: its connections, and its place among the workers."""

    connections: int = 1
    index: int = 0
    of: int = 1

    @classmethod
    def among(cls, workers: int, connections: int) -> list[Share]:
        """Shares whose connections add up to at most `connections`; fewer than `workers` where they would have none."""
        of = min(workers, connections)
        return [cls(connections // of + (index < connections % of), index, of) for index in range(of)]

    def next_turn(self, after: float, interval_s: float) -> float:
        """The first moment later than `after` at which this worker may ask (seconds since the epoch)."""
        cycle, first = self.of * interval_s, self.index * interval_s
        return first + (math.floor((after + CLOCK_S - first) / cycle) + 1) * cycle


class Pace:
    """One worker's pace with one host."""

    def __init__(self, share: Share) -> None:
        self.connections = asyncio.Semaphore(share.connections)
        self._share, self._one_by_one = share, asyncio.Lock()
        self._last_turn = self._resume_at = 0.0

    async def turn(self, interval_s: float) -> None:
        """Wait for this worker's next turn, and for as long as the host asked us to, also if it asks meanwhile."""
        async with self._one_by_one:
            turn = self._share.next_turn(max(time.time(), self._last_turn, self._resume_at), interval_s)
            await _sleep_until(turn)
            while turn < self._resume_at:
                turn = self._share.next_turn(self._resume_at, interval_s)
                await _sleep_until(turn)
            self._last_turn = turn

    def rest(self, until: float) -> None:
        """The host wants no request before this moment (seconds since the epoch)."""
        self._resume_at = max(self._resume_at, until)


async def _sleep_until(moment: float) -> None:
    wait_s = moment - time.time()
    if wait_s > 0.0005:
        await asyncio.sleep(wait_s)
