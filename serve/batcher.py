"""A bounded line of commissions in front of one generator: those that can be painted together are.

While a batch is painted, in a thread, new commissions wait; the next batch is the first in line and whatever else
has its steps and size, up to `max_batch` pictures. No prompt is logged.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serve.work import Busy, Commission, Failed, Outcome

logger = logging.getLogger(__name__)

Paint = Callable[[Sequence[Commission]], list[Outcome]]


@dataclass(eq=False)
class _Place:
    """One commission in line, and where its outcome goes."""

    commission: Commission
    outcome: asyncio.Future[Outcome]

    @property
    def pictures(self) -> int:
        return len(self.commission.seeds)

    @property
    def kind(self) -> tuple[int, int]:
        return self.commission.steps, self.commission.size_px


class Batcher:
    """Submit from one event loop; `paint` runs in one thread, a batch at a time."""

    def __init__(self, paint: Paint, max_batch: int, max_waiting: int) -> None:
        self._paint = paint
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._line: list[_Place] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="paint")
        self._batch_s = 5.0  # how long a batch takes, a running mean

    async def submit(self, commission: Commission) -> Outcome:
        """Wait for the pictures. Busy at once when the line is full; leaves the line when cancelled."""
        if len(self._line) >= self._max_waiting:
            return Busy(max(1, math.ceil(self._batch_s)))  # when the line has moved once
        place = _Place(commission, asyncio.get_running_loop().create_future())
        self._line.append(place)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())
        try:
            return await place.outcome
        finally:
            if place in self._line:
                self._line.remove(place)

    def close(self) -> None:
        """End the thread once it has finished what it paints."""
        self._thread.shutdown()

    async def _work(self) -> None:
        while self._line:
            batch = self._next()
            started = asyncio.get_running_loop().time()
            outcomes = await self._outcomes(batch)
            self._batch_s += 0.3 * (asyncio.get_running_loop().time() - started - self._batch_s)
            for place, outcome in zip(batch, outcomes, strict=True):
                if not place.outcome.done():  # the visitor may have left
                    place.outcome.set_result(outcome)

    def _next(self) -> list[_Place]:
        """Take the first in line and those that fit with it."""
        batch, pictures = [self._line[0]], self._line[0].pictures
        for place in self._line[1:]:
            if place.kind == batch[0].kind and pictures + place.pictures <= self._max_batch:
                batch.append(place)
                pictures += place.pictures
        self._line = [place for place in self._line if place not in batch]
        return batch

    async def _outcomes(self, batch: list[_Place]) -> list[Outcome]:
        """Paint together; where that fails, paint one by one, so that one commission cannot spoil its neighbours'."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._paint, [place.commission for place in batch])
        except Exception:
            logger.exception("painting %d commissions failed", len(batch))
        if len(batch) == 1:
            return [Failed("the picture could not be painted: the server's log says why")]
        return [outcome for place in batch for outcome in await self._outcomes([place])]
