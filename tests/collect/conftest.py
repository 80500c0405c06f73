"""A museum's host: each test file has its own `museum`, with an aiohttp `app`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from momalisa.miniature.wing import serve_in_thread


@pytest.fixture
def base(museum: Any) -> Iterator[str]:
    """Its address while it is open."""
    with serve_in_thread(museum.app) as address:
        yield address
