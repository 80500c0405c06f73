"""Keeps an eye on refs/best: a checkpoint promoted while the service runs is loaded beside the old one and put on trial.

What cannot be loaded (a file that is not what its manifest says, a UNet that does not fit) is never served: the old
checkpoint stays, and the state says why. It is tried again when refs/best moves, and every `AGAIN_S`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from momalisa import checkpoint
from momalisa.storage import Store
from serve import room
from serve.loaded_checkpoint import LoadedCheckpoint
from serve.scheduler import Scheduler

logger = logging.getLogger(__name__)

AGAIN_S = 300.0


@dataclass(frozen=True)
class GivenUp:
    """A checkpoint that is not tried before `until`, and why."""

    path: str = ""
    problem: str = ""
    until: float = 0.0


class Watch:
    """A thread of its own: pictures are drawn while weights load. What is served it asks the scheduler, at every look."""

    def __init__(self, store: Store, load: Callable[[str], LoadedCheckpoint], scheduler: Scheduler, every_s: float) -> None:
        self._store, self._load, self._scheduler, self._every_s = store, load, scheduler, every_s
        self._given_up = GivenUp()
        self._unloaded = 0
        self._ended = threading.Event()
        self.problem = ""
        scheduler.on_given_up = self._canary_failed
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Once. Does not raise.

        There is memory for one checkpoint beside the main one: the next one is loaded when what was on trial is withdrawn and
        what finishes old requests is unloaded.
        """
        if (unloaded := self._scheduler.unloaded) != self._unloaded:
            self._unloaded = unloaded
            room.tidy()
        try:
            path = str(self._store.read_json(checkpoint.BEST)["checkpoint"])
        except Exception as error:
            self.problem = f"refs/best cannot be read: {error}"
            return
        main, trial, unloading = self._scheduler.serving()
        given_up = self._given_up
        if trial not in ("", path):
            self._scheduler.abort_rollout(f"refs/best is {path}")
        if path in (main, trial):
            self.problem = ""
            self._given_up = GivenUp() if path == main else given_up
        elif path == given_up.path and time.monotonic() < given_up.until:
            self.problem = given_up.problem
        elif not (trial or unloading):
            self._try(path)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.look()

    def _try(self, path: str) -> None:
        try:
            new = self._load(path)
        except Exception as error:
            self._give_up(path, f"{path} cannot be served: {error}")
        else:
            self.problem = ""
            self._scheduler.roll_out(new)
            logger.info("%s is on trial", new.id)
            return
        room.tidy()  # whatever of it was loaded

    def _canary_failed(self, new: LoadedCheckpoint, problem: str) -> None:
        """The scheduler's word, from another thread: a trial has failed."""
        self._give_up(new.path, f"{new.id} failed its trial: {problem}")

    def _give_up(self, path: str, problem: str) -> None:
        logger.error("%s", problem)
        self.problem = problem
        self._given_up = GivenUp(path, problem, time.monotonic() + AGAIN_S)
