"""A generator in this process: a tiny checkpoint with random weights, promoted in a store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

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
