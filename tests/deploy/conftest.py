"""A fake RunPod for each test, and the environment that leads to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.fake_runpod import KEY, FakeRunpod


@pytest.fixture
def runpod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeRunpod]:
    with FakeRunpod().serving() as fake:
        monkeypatch.setenv("MOMALISA_RUNPOD_URL", fake.url)
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        monkeypatch.setenv("MOMALISA_STATE", str(tmp_path / "state"))
        yield fake
        assert not fake.violations
