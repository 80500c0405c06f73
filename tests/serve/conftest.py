"""A generator in this process: a tiny checkpoint with random weights, promoted in a store."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from momalisa import config
from momalisa.config import Settings
from serve.api import create_app
from serve.replica import Generator

LIMITS = config.Serve(
    size_px=64,
    steps=1,
    guidance_scale=1.0,
    max_pictures_per_request=3,
    max_prompt_chars=200,
    max_rows=16,
    max_waiting_rows=16,
    watch_s=0,
    threads=1,
)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """An app behind a real server, at a loopback address of its own."""
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)  # so that nobody comes too early
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="session")
def settings(promoted_root: Path) -> Settings:
    return Settings.model_construct(**{**dict(Settings.model_construct()), "root": str(promoted_root), "serve": LIMITS})


@pytest.fixture(scope="session")
def generator(settings: Settings) -> Iterator[Generator]:
    made = Generator(settings)
    yield made
    made.close()


@pytest.fixture
async def client(generator: Generator) -> AsyncIterator[httpx.AsyncClient]:
    """Its errors are answers, as they are over a socket."""
    transport = httpx.ASGITransport(create_app(generator, LIMITS), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://museum") as made:
        yield made
