"""Promotion while the service runs, with real checkpoints in a real store."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from momalisa import checkpoint
from momalisa.config import Settings
from momalisa.storage import Store
from serve.answers import collect
from serve.replica import Generator
from serve.task import GenerationTask

TASK = GenerationTask("x", (0,), 2, 1.0, 64)


@pytest.fixture
def store(settings: Settings, tmp_path: Path) -> Store:
    return Store(str(shutil.copytree(settings.root, tmp_path / "root")))


@pytest.fixture
async def running(settings: Settings, store: Store) -> AsyncIterator[Generator]:
    serve = settings.serve.model_copy(update={"watch_s": 0.1, "canary_s": 0.3, "canary_share": 0.5})
    made = Generator(settings.model_copy(update={"root": store.root, "serve": serve}))
    yield made
    await asyncio.to_thread(made.close)


def publish(store: Store, tmp_path: Path, images: int, spoil: float | None = None) -> str:
    """A further checkpoint, of the same weights or of numbers that are none."""
    published = checkpoint.read(store, "checkpoints/tiny/64")
    unet: Any = checkpoint.load_unet(store, published)
    if spoil is not None:
        unet.conv_out.weight.data.fill_(spoil)
    checkpoint.save_weights(unet, tmp_path / f"w{images}", lora=False)
    entry = checkpoint.Checkpoint(f"checkpoints/tiny/{images}", "tiny", images, published.base, files={})
    checkpoint.write(store, entry, tmp_path / f"w{images}")
    return entry.path


def damage(store: Store, path: str) -> None:
    weights = next(Path(store.root, path).rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")


def promote(store: Store, path: str) -> None:
    store.write_json(checkpoint.BEST, {"checkpoint": path})


async def until_state(generator: Generator, **wanted: str) -> None:
    end = time.monotonic() + 30
    while True:
        state = await generator.state()
        if all(text in getattr(state, name) for name, text in wanted.items()):
            return
        assert time.monotonic() < end, state
        await asyncio.sleep(0.05)


async def test_a_promotion_while_visitors_paint(running: Generator, store: Store, tmp_path: Path) -> None:
    painted: list[str] = []
    stop = asyncio.Event()

    async def visitor() -> None:
        while not stop.is_set():
            pictures, _ = await collect(running, TASK)  # raises where no picture comes
            painted.append(pictures[0].checkpoint)

    visitors = [asyncio.create_task(visitor()) for _ in range(3)]
    path = await asyncio.to_thread(publish, store, tmp_path, 128)
    promote(store, path)
    await until_state(running, checkpoint="tiny-128")
    await collect(running, TASK)
    stop.set()
    await asyncio.gather(*visitors)
    assert {"tiny-64", "tiny-128"} == set(painted)
    assert painted.index("tiny-128") > 0
    assert painted[-1] == "tiny-128"
    assert (await running.state()).problem == ""


async def test_a_corrupt_checkpoint_is_never_served(running: Generator, store: Store, tmp_path: Path) -> None:
    path = publish(store, tmp_path, 128)
    damage(store, path)
    promote(store, path)
    await until_state(running, problem="checkpoints/tiny/128 cannot be served")
    assert (await running.state()).checkpoint == "tiny-64"
    [(_, text)] = await running.metrics()
    assert "momalisa_best_not_served 1.0" in text
    promote(store, "checkpoints/tiny/64")
    end = time.monotonic() + 10
    while (await running.state()).problem:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    assert (await collect(running, TASK))[0][0].checkpoint == "tiny-64"


async def test_weights_that_paint_nothing_are_found_out_before_anybody_sees_them(
    running: Generator, store: Store, tmp_path: Path
) -> None:
    promote(store, publish(store, tmp_path, 128, spoil=float("nan")))
    await until_state(running, problem="NaN")
    assert (await running.state()).checkpoint == "tiny-64"
    promote(store, "checkpoints/tiny/nothing")
    await until_state(running, problem="holds no complete checkpoint")
    store.write_json(checkpoint.BEST, {})
    await until_state(running, problem="refs/best cannot be read")
    assert (await collect(running, TASK))[0][0].checkpoint == "tiny-64"
