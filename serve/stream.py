"""Answers that end when the client does: an event stream, and work that is given up when nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody is there to be answered."""


async def left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def first(work: Coroutine[Any, Any, T], gone: Coroutine[Any, Any, None]) -> T:
    """What `work` returns. Raises ClientLeft where `gone` ends before it; work is then cancelled, and has ended."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result, if the client is still there; its body has been read. Raises ClientLeft."""
    return await first(work, left(request.receive))


class EventStream(Response):
    """Server-sent events. A client that leaves, or takes nothing for `stall_s`, ends them: nothing piles up for it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], stall_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._stall_s = events, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await first(self._send(send), left(receive))
        except (ClientLeft, TimeoutError):
            return
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
