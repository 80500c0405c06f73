"""How training learns that it must end: `ray job stop` (a SIGTERM to the job), or a machine that will be taken away.

Either way the workers write a checkpoint of the step they are at and leave. After a stop the job ends, and the same
command goes on from there; after a machine's notice Ray Train starts the workers on the machines that stay.

And how a job learns that trying again is no use: what the same settings would meet each time ends it with a message.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

POLL_S = 0.5
AGREED_S = 20  # how long a worker that gives up waits for the others to do so too
STOPPED = 128 + signal.SIGTERM


class Bell:
    """An actor between a job and its workers, which outlives them: it knows how far those before came."""

    def __init__(self) -> None:
        self._rung, self._left, self._at, self._training = False, "", 0, False
        self._hopeless: dict[int, tuple[str, str]] = {}

    def ring(self) -> bool:
        """What workers said that left before, because of a machine's notice, is no answer to this; returns whether any train."""
        self._rung, self._left = True, ""
        return self._training

    def rung(self) -> bool:
        return self._rung

    def leave(self, said: str) -> None:
        self._left, self._training = said, False

    def left(self) -> str:
        return self._left

    def give_up(self, rank: int, said: str, where: str) -> int:
        """A worker has met what is the same each time; returns how many have."""
        self._hopeless[rank] = said, where
        return len(self._hopeless)

    def hopeless(self) -> tuple[str, str] | None:
        """What the first of them said, and its traceback."""
        return next(iter(self._hopeless.values()), None)

    def at(self, images_seen: int) -> None:
        self._at = images_seen

    def begin(self, images_seen: int) -> int:
        """New workers go on from here; returns how many images the last ones had seen beyond that."""
        again, self._at, self._training = max(self._at - images_seen, 0), images_seen, True
        return again


@contextlib.contextmanager
def stoppable() -> Iterator[Any]:
    """A bell that SIGTERM rings. When the workers have left, the process ends with status 143."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lives as long as the job
    bell: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Bell).remote()
    asked, over = threading.Event(), threading.Event()

    def watch() -> None:
        asked.wait()
        if over.is_set():
            return
        if not ray.get(bell.ring.remote()):
            print("train: stopped, no worker had begun; the same command starts again", flush=True)
            os._exit(STOPPED)
        print("train: asked to stop; writing a checkpoint of this step first", flush=True)
        while not (said := ray.get(bell.left.remote())):
            if over.wait(POLL_S):
                return
        print(f"train: stopped, {said}", flush=True)
        os._exit(STOPPED)

    thread = threading.Thread(target=watch, name="ending", daemon=True)
    thread.start()
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set()) if in_main else None
    try:
        yield bell
    finally:
        over.set()
        asked.set()
        if in_main:
            signal.signal(signal.SIGTERM, before)
        thread.join()


def following(bell: Any, heard: Callable[[dict[str, float]], None]) -> Callable[[dict[str, float]], None]:
    """The same listener for a run's metrics, with the bell told how far the run is; nobody waits for it."""

    def told(metrics: dict[str, float]) -> None:
        bell.at.remote(int(metrics["images_seen"]))
        heard(metrics)

    return told


def begin(bell: Any, images_seen: int) -> None:
    """Say where the run goes on, and what an end without notice has cost."""
    import ray

    again = ray.get(bell.begin.remote(images_seen))
    if images_seen or again:
        cost = f"; {again} that were seen after them are trained again" if again else ""
        print(f"train: going on from {images_seen} images{cost}", flush=True)


def give_up(bell: Any, rank: int, workers: int, error: Exception) -> bool:
    """Tell the job what ends this worker. True: it ends all, so they can leave as if they were done, and none starts again.

    False where the others go on and would wait for this one: it has to fail, so that Ray Train ends them too.
    """
    import ray

    where, deadline = "".join(traceback.format_exception(error)), time.monotonic() + AGREED_S
    while ray.get(bell.give_up.remote(rank, str(error), where)) < workers:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


@contextlib.contextmanager
def listening(bell: Any) -> Iterator[Callable[[], bool]]:
    """In a worker: whether to end, kept up to date by a thread so that asking costs a step nothing."""
    import ray
    from ray.exceptions import RayError
    from ray.train.v2._internal.execution.context import get_train_context

    preemption = get_train_context().preemption_context  # what ray.train.get_preemption_info() agrees on by a barrier
    ending, over = threading.Event(), threading.Event()

    def listen() -> None:
        while not over.wait(POLL_S) and not ending.is_set():
            with contextlib.suppress(RayError):
                if preemption.preemption_info is not None or ray.get(bell.rung.remote()):
                    ending.set()

    thread = threading.Thread(target=listen, name="listening", daemon=True)
    thread.start()
    try:
        yield ending.is_set
    finally:
        over.set()
        thread.join()
