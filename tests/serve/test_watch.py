"""Promotion while the service runs, with real checkpoints in a real store; then each look, with doubles of engines."""

from __future__ import annotations

import asyncio
import gc
import shutil
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from momalisa import checkpoint
from momalisa.config import Serve, Settings
from momalisa.storage import Store
from serve.answers import collect
from serve.loaded_checkpoint import LoadedCheckpoint
from serve.meters import Meters
from serve.rehearsal import sample_of
from serve.replica import Generator
from serve.scheduler import Scheduler
from serve.task import GenerationTask
from serve.watch import Watch
from tests.serve.double import black, loaded

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
    await until_state(running, problem="checkpoints/tiny/128 cannot be served: the UNet produced NaN or infinity")
    assert (await running.state()).checkpoint == "tiny-64"
    promote(store, "checkpoints/tiny/nothing")
    await until_state(running, problem="holds no complete checkpoint")
    store.write_json(checkpoint.BEST, {})
    await until_state(running, problem="refs/best cannot be read")
    assert (await collect(running, TASK))[0][0].checkpoint == "tiny-64"


# ---- what the watch decides, look by look

SHORT, LONG = 0.05, 3600.0  # trials


class Museum:
    """A store, a scheduler of doubles and a watch that looks when it is told to. `spoilt`: those that paint black."""

    def __init__(self, root: Path, canary_s: float) -> None:
        self.store, self.loads, self.spoilt = Store(str(root)), list[LoadedCheckpoint](), set[str]()
        limits = Serve(max_rows=4, steps=2, canary_s=canary_s)
        self.scheduler = Scheduler(self.load("checkpoints/a"), limits, Meters())
        self.watch = Watch(self.store, self.load, self.scheduler, LONG)

    def load(self, path: str) -> LoadedCheckpoint:
        assert self.open() <= 1, "a third checkpoint in memory"
        name = path.removeprefix("checkpoints/")
        self.loads.append(loaded(name, black if name in self.spoilt else None))
        return self.loads[-1]

    def open(self) -> int:
        return sum(not one.engine.closed for one in self.loads)  # type: ignore[attr-defined]

    def promote(self, name: str) -> None:
        promote(self.store, f"checkpoints/{name}")

    def look_until(self, main: str, trial: str = "") -> None:
        wanted = (main, trial)

        def reached() -> bool:
            self.watch.look()
            state = self.scheduler.state()
            return (state.checkpoint, state.trial) == wanted

        eventually(reached)

    def close(self) -> None:
        self.watch.close()
        self.scheduler.close()


def eventually(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@pytest.fixture
def museums(tmp_path: Path) -> Iterator[Callable[[float], Museum]]:
    made: list[Museum] = []

    def opened(canary_s: float) -> Museum:
        made.append(Museum(tmp_path, canary_s))
        return made[-1]

    yield opened
    for museum in made:
        museum.close()


def test_promotions_within_a_trial_and_back_to_the_first(museums: Callable[[float], Museum]) -> None:
    museum = museums(LONG)
    for name in ("b", "c"):
        museum.promote(name)
        museum.look_until("a", trial=name)
    museum.promote("a")
    museum.look_until("a")
    assert museum.watch.problem == ""
    eventually(lambda: museum.open() == 1)
    museum.promote("c")  # it was not given up, and is tried anew
    museum.look_until("a", trial="c")
    assert [one.id for one in museum.loads] == ["a", "b", "c", "c"]
    assert "momalisa_rollbacks_total 0.0" in museum.scheduler._meters.text()


def test_promotions_after_each_trial_and_back_to_the_first(museums: Callable[[float], Museum]) -> None:
    museum = museums(SHORT)
    for name in ("b", "c", "a"):
        museum.promote(name)
        museum.look_until(name)
    assert (museum.watch.problem, [one.id for one in museum.loads]) == ("", ["a", "b", "c", "a"])
    museum.watch.look()
    assert len(museum.loads) == 4


def test_a_rollback_beside_a_trial_that_passes_is_not_lost(museums: Callable[[float], Museum], monkeypatch: Any) -> None:
    museum = museums(LONG)
    scheduler = museum.scheduler
    museum.promote("b")
    museum.look_until("a", trial="b")
    museum.promote("a")

    def late(reason: str) -> None:
        monkeypatch.undo()
        assert scheduler._rollout.canary is not None
        scheduler._rollout.canary.ends_at = 0.0
        eventually(lambda: scheduler.state().checkpoint == "b")
        scheduler.abort_rollout(reason)

    monkeypatch.setattr(scheduler, "abort_rollout", late)
    museum.watch.look()
    assert scheduler.state().checkpoint == "b"
    museum.look_until("b", trial="a")
    assert [one.id for one in museum.loads] == ["a", "b", "a"]


def test_the_next_one_is_loaded_when_the_old_one_has_finished(museums: Callable[[float], Museum]) -> None:
    museum = museums(0.0)
    old = museum.loads[0]
    old.engine.paused = True  # type: ignore[attr-defined]
    with museum.scheduler._wake:
        old.start(sample_of(Serve(steps=2), 0, 0.0))
    museum.promote("b")
    museum.look_until("b")
    museum.promote("c")
    for _ in range(3):
        museum.watch.look()
    assert [one.id for one in museum.loads] == ["a", "b"]
    old.engine.paused = False  # type: ignore[attr-defined]
    museum.look_until("c")


def test_what_is_unloaded_is_in_memory_no_more(museums: Callable[[float], Museum]) -> None:
    """Nor is it while no visitor comes, whether or not it lies in a cycle, as a compiled UNet does."""
    museum = museums(0.0)
    old = museum.loads[0]
    old.engine.paused = True  # type: ignore[attr-defined]
    with museum.scheduler._wake:
        old.start(sample_of(Serve(steps=2), 0, 0.0))
    museum.promote("b")
    museum.look_until("b")
    engine, cycle = weakref.ref(old.engine), weakref.ref(old)
    old.itself = old  # type: ignore[attr-defined]
    old.engine.paused = False  # type: ignore[attr-defined]
    museum.loads.clear()
    del old
    gc.disable()
    try:
        eventually(lambda: not museum.scheduler._rollout.retiring)
        eventually(lambda: museum.watch.look() or (engine() is None and cycle() is None))  # type: ignore[func-returns-value]
    finally:
        gc.enable()


def test_one_that_cannot_be_loaded_is_spoken_of_at_every_attempt(
    museums: Callable[[float], Museum], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    museum, asked = museums(LONG), list[str]()

    def load(path: str) -> LoadedCheckpoint:
        asked.append(path)
        raise ValueError("there is no GPU memory for a second checkpoint")

    monkeypatch.setattr(museum.watch, "_load", load)
    museum.promote("b")
    began = time.monotonic()
    for after_s in (0, 299, 301, 599, 603):
        monkeypatch.setattr("serve.watch.time.monotonic", lambda: began + after_s)  # noqa: B023
        museum.watch.look()
        assert museum.watch.problem == "checkpoints/b cannot be served: there is no GPU memory for a second checkpoint"
        assert museum.scheduler.state().checkpoint == "a"
    assert len(asked) == caplog.text.count("there is no GPU memory") == 3


def test_one_that_failed_is_tried_again_when_the_pointer_moves_or_after_a_while(
    museums: Callable[[float], Museum], monkeypatch: pytest.MonkeyPatch
) -> None:
    museum = museums(LONG)
    museum.spoilt = {"b"}
    museum.promote("b")
    museum.watch.look()
    eventually(lambda: museum.scheduler.serving() == ("checkpoints/a", "", False))
    for _ in range(3):
        museum.watch.look()
        assert museum.watch.problem.startswith("b failed its trial: GenerationError: the picture is one flat colour")
    assert len(museum.loads) == 2
    museum.promote("a")
    museum.look_until("a")
    assert museum.watch.problem == ""
    museum.promote("b")
    museum.watch.look()
    eventually(lambda: museum.scheduler.serving() == ("checkpoints/a", "", False))
    assert len(museum.loads) == 3
    now = time.monotonic()
    monkeypatch.setattr("serve.watch.time.monotonic", lambda: now + 299)
    museum.watch.look()
    assert len(museum.loads) == 3
    monkeypatch.setattr("serve.watch.time.monotonic", lambda: now + 301)
    museum.watch.look()
    assert len(museum.loads) == 4
