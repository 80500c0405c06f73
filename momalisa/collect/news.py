"""What one worker hears from a host and all of a run must know at once: pauses (`Retry-After`), and a no for good."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

PATIENCE_S = 5.0  # without news an answer comes after so long: whoever asked may be gone


@dataclass
class Heard:
    """What hosts have said to any worker."""

    pauses: dict[str, float] = field(default_factory=dict)  # host -> until when it wants no request: seconds since the epoch
    blocked: set[str] = field(default_factory=set)  # hosts that answer with a challenge page

    def copy(self) -> Heard:
        return Heard(dict(self.pauses), set(self.blocked))


class News(Protocol):
    """How workers tell each other."""

    async def pause(self, host: str, until: float) -> None: ...

    async def block(self, host: str) -> None: ...

    async def beyond(self, known: Heard | None) -> Heard:
        """All that was heard, as soon as it is something else than `known` (None: at once), or after a while."""
        ...


class NewsBook:
    """What the workers of a run tell each other, in one event loop."""

    def __init__(self) -> None:
        self._heard, self._news = Heard(), asyncio.Condition()

    async def pause(self, host: str, until: float) -> None:
        async with self._news:
            self._heard.pauses[host] = max(until, self._heard.pauses.get(host, 0.0))
            self._news.notify_all()

    async def block(self, host: str) -> None:
        async with self._news:
            self._heard.blocked.add(host)
            self._news.notify_all()

    async def beyond(self, known: Heard | None) -> Heard:
        async with self._news:
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await self._news.wait_for(lambda: self._heard != known)
            return self._heard.copy()
