"""Pauses that hosts ask for (`Retry-After`), heard by one worker and kept by all of a run."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

PATIENCE_S = 5.0  # without news an answer comes after so long: whoever asked may be gone


class Pauses(Protocol):
    """Until when hosts want no request (seconds since the epoch), as any worker was told."""

    async def add(self, host: str, until: float) -> None: ...

    async def beyond(self, known: dict[str, float] | None) -> dict[str, float]:
        """All of them, as soon as they are others than `known` (None: at once), or after a while."""
        ...


class PauseBook:
    """What the workers of a run tell each other, in one event loop."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._news = asyncio.Condition()

    async def add(self, host: str, until: float) -> None:
        async with self._news:
            self._until[host] = max(until, self._until.get(host, 0.0))
            self._news.notify_all()

    async def beyond(self, known: dict[str, float] | None) -> dict[str, float]:
        async with self._news:
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await self._news.wait_for(lambda: self._until != known)
            return dict(self._until)
