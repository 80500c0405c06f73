"""A second checkpoint is loaded where there is memory for it. The GPU's figures are doubles but for the last test."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from momalisa.config import Settings
from momalisa.engine import Engine
from momalisa.storage import Store
from serve.answers import collect
from serve.replica import Generator
from serve.room import GIB, Room, tidy
from tests.serve.test_watch import TASK, promote, publish, running, store, until_state

__all__ = ["running", "store"]  # fixtures


class Gpu:
    """`free` bytes, and those that this process has of it."""

    def __init__(self) -> None:
        self.free, self.reserved = 10 * GIB, 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (made.free, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: made.reserved)
    return made


def take(room: Room, gpu: Gpu, bytes_: int, others: int = 0) -> None:
    """`others`: bytes that another process takes meanwhile."""
    with room.for_checkpoint():
        gpu.free -= bytes_ + others
        gpu.reserved += bytes_


def test_a_checkpoint_needs_what_the_last_one_took(gpu: Gpu) -> None:
    room = Room("cuda")
    take(room, gpu, 6 * GIB)
    with pytest.raises(ValueError, match=r"4\.00 GiB are free, and one took 6\.00 GiB; try a smaller serve\.max_rows"):
        take(room, gpu, 1)
    assert gpu.free == 4 * GIB  # nothing was loaded
    gpu.free = 6 * GIB
    take(room, gpu, 5 * GIB)
    gpu.free = 5 * GIB - 1
    with pytest.raises(ValueError, match=r"one took 5\.00 GiB"):
        take(room, gpu, 1)
    gpu.free = 5 * GIB
    take(room, gpu, 1)


def test_what_other_processes_take_meanwhile_is_not_needed_again(gpu: Gpu) -> None:
    """Two replicas on one GPU start together."""
    room = Room("cuda")
    take(room, gpu, 3 * GIB, others=3 * GIB)
    assert gpu.free == 4 * GIB
    take(room, gpu, 3 * GIB)


def test_one_that_could_not_be_loaded_says_nothing_about_the_next(gpu: Gpu) -> None:
    room = Room("cuda")

    def fail() -> None:
        gpu.free = GIB
        raise OSError("no file")

    with pytest.raises(OSError, match="no file"), room.for_checkpoint():
        fail()
    take(room, gpu, GIB // 2)
    take(room, gpu, GIB // 2)


def test_a_cpu_is_asked_nothing(gpu: Gpu) -> None:
    room = Room("cpu")
    take(room, gpu, 6 * GIB)
    take(room, gpu, 6 * GIB)


async def test_a_promotion_that_has_no_room_is_not_loaded_and_the_old_one_paints_on(
    running: Generator, store: Store, tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running._room, "_gpu", True)
    monkeypatch.setattr(running._room, "_needed", 11 * GIB)
    promote(store, await asyncio.to_thread(publish, store, tmp_path, 128))
    await until_state(running, problem="checkpoints/tiny/128 cannot be served: there is no GPU memory for a second checkpoint")
    [(_, text)] = await running.metrics()
    assert "momalisa_best_not_served 1.0" in text
    assert (await collect(running, TASK))[0][0].checkpoint == "tiny-64"


@pytest.mark.gpu
def test_where_others_have_the_gpus_memory_nothing_is_loaded(settings: Settings, tmp_path: Path) -> None:
    from momalisa import checkpoint

    diffusion = checkpoint.read_best(Store(settings.root)).diffusion

    def load() -> Engine:
        engine = Engine.load(diffusion, device="cuda", max_rows=4)
        assert engine.compile([64], tmp_path)
        return engine

    room = Room("cuda")
    with room.for_checkpoint():
        first = load()
    assert room._needed > 0
    tidy()
    free = torch.cuda.mem_get_info()[0]
    hoard = torch.empty(free - room._needed // 2, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match="no GPU memory for a second checkpoint"), room.for_checkpoint():
        load()
    del hoard
    with room.for_checkpoint():
        second = load()
    shared = torch.cuda.memory_allocated()
    del first, second
    tidy()
    assert torch.cuda.memory_allocated() < shared
