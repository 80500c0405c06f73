"""From the painting thread to one reader in an event loop, without ever holding more than one event of a kind.

A reader that is slow, or stopped, misses places in line and previews that newer ones have replaced; pictures and the
outcome are kept. So what is held for it is at most a preview and a picture for each of its seeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from serve.task import Completed, Event, Failed, Picture, Progress, Rejected


class Mailbox:
    """Post from any thread; read from the loop it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: dict[tuple[str, int], Event] = {}
        self._ready = asyncio.Event()

    def post(self, event: Event) -> None:
        """An event for a reader whose loop has ended is dropped."""
        try:
            self._loop.call_soon_threadsafe(self._put, event)
        except RuntimeError:
            return

    def __len__(self) -> int:
        return len(self._events)

    def _put(self, event: Event) -> None:
        kind = (type(event).__name__, event.index if isinstance(event, Progress | Picture) else 0)
        self._events.pop(kind, None)  # the newer one comes after what was posted between
        self._events[kind] = event
        self._ready.set()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Up to and with the outcome."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            while self._events:
                event = self._events.pop(next(iter(self._events)))
                yield event
                if isinstance(event, Completed | Rejected | Failed):
                    return
