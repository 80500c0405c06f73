"""Bodies that are too long, too slow, or too many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import bodies
from serve.api import create_app
from serve.bodies import UploadMemory
from serve.errors import ApiError
from tests.serve.conftest import LIMITS
from tests.serve.test_api import FakeBackend

TIGHT = LIMITS.model_copy(update={"max_upload_bytes": 1_000, "upload_memory_bytes": 2_000})
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://museum")


async def test_uploads_share_the_memory_there_is_and_give_it_back() -> None:
    held, go = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncGenerator[bytes, None]:
        yield b"x" * 1_500
        held.set()
        await go.wait()

    async with client_of(create_app(FakeBackend(), TIGHT)) as client:
        first = asyncio.create_task(client.post("/v1/images/edits", content=slowly(), headers=FORM))
        await held.wait()
        refused = await client.post("/v1/images/edits", content=b"y" * 600, headers=FORM)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "uploads_full")
        assert int(refused.headers["Retry-After"]) >= 1
        assert (await client.post("/v1/images/edits", content=b"y" * 400, headers=FORM)).status_code == 400  # it is no form
        assert (await client.post("/v1/images/generations", json={"prompt": "x"})).status_code == 200
        go.set()
        assert (await first).status_code == 400
        assert (await client.post("/v1/images/edits", content=b"y" * 1_900, headers=FORM)).status_code == 400


@given(st.lists(st.lists(st.integers(0, 60), max_size=5), max_size=8))
def test_memory_is_never_above_its_bound_and_nothing_is_lost(uploads: list[list[int]]) -> None:
    memory = UploadMemory(100)
    for sizes in uploads:
        fits = 30 + sum(sizes) <= 100
        with memory.upload() as outer:
            outer(30)
            with nullcontext() if fits else pytest.raises(ApiError, match="uploads fill"), memory.upload() as take:
                for size in sizes:
                    take(size)
                    assert memory.held <= 100
                assert memory.held == 30 + sum(sizes)
            assert memory.held == 30
        assert memory.held == 0


async def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "WITHIN_S", 0.05)

    async def never() -> AsyncGenerator[bytes, None]:
        yield b"{"
        await asyncio.Event().wait()

    async with client_of(create_app(FakeBackend(), TIGHT)) as client:
        for path in ("/v1/images/generations", "/v1/images/edits"):
            answer = await client.post(path, content=never(), headers=FORM)
            assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_too_slow")
