"""Request bodies: each within its limit, uploads together within the memory there is for them, and none for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from serve.errors import ApiError

WITHIN_S = 120.0  # a body that takes longer to arrive is given up
AGAIN_S = 5  # when uploads are likely to have been read


def unbounded(size: int) -> None:
    """Bodies so small that they are not counted."""


async def read(request: Request, limit: int, take: Callable[[int], None] = unbounded) -> bytes:
    """The whole body. Raises ApiError: 413 as soon as it is longer than `limit` bytes, 408 where it does not arrive."""
    body = bytearray()
    try:
        async with asyncio.timeout(WITHIN_S):
            async for chunk in request.stream():
                take(len(chunk))
                body += chunk
                if len(body) > limit:
                    raise ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    except TimeoutError:
        message = f"the body did not arrive within {WITHIN_S:.0f} s"
        raise ApiError(408, message, code="body_too_slow", kind="timeout_error") from None
    return bytes(body)


class UploadMemory:
    """`max_bytes` of uploaded bodies at once, whoever sends them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held = max_bytes, 0

    @contextmanager
    def upload(self) -> Iterator[Callable[[int], None]]:
        """A function that takes so many bytes more, or raises ApiError (503). All are given back at the end."""
        own = 0

        def take(size: int) -> None:
            nonlocal own
            if self.held + size > self.max_bytes:
                message = f"uploads fill the {self.max_bytes} bytes that there are for them; try again in {AGAIN_S} s"
                raise ApiError(503, message, None, "uploads_full", "server_error", AGAIN_S)
            self.held += size
            own += size

        try:
            yield take
        finally:
            self.held -= own
