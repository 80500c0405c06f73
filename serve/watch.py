"""Keeps an eye on refs/best: a checkpoint promoted while the service runs is loaded beside the old one and put on trial.

What cannot be loaded (a file that is not what its manifest says, a UNet that does not fit) is never served: the old
checkpoint stays, and the state says why. It is tried again when refs/best moves, and every `AGAIN_S`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from momalisa import checkpoint
from momalisa.storage import Store
from serve.loaded_checkpoint import LoadedCheckpoint
from serve.scheduler import Scheduler

logger = logging.getLogger(__name__)

AGAIN_S = 300.0


class Watch:
    """A thread of its own: pictures are drawn while weights load. `path` is what is served already."""

    def __init__(
        self, store: Store, path: str, load: Callable[[str], LoadedCheckpoint], scheduler: Scheduler, every_s: float
    ) -> None:
        self._store, self._load, self._scheduler, self._every_s = store, load, scheduler, every_s
        self._served, self._newest = path, path  # what is the main one, and what the scheduler was last given
        self._given_up: dict[str, float] = {}
        self._ended = threading.Event()
        self.problem = ""
        scheduler.on_given_up = self._canary_failed
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Once. Does not raise."""
        try:
            path = str(self._store.read_json(checkpoint.BEST)["checkpoint"])
        except Exception as error:
            self.problem = f"refs/best cannot be read: {error}"
            return
        if path == self._newest:
            self.problem = ""
        elif path == self._served and self._on_trial():
            self._scheduler.abort_rollout("refs/best was moved back")
            self._newest, self.problem = path, ""
        elif time.monotonic() >= self._given_up.get(path, 0.0):
            self._try(path)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.look()

    def _on_trial(self) -> bool:
        return bool(self._scheduler.state().trial)

    def _try(self, path: str) -> None:
        try:
            new = self._load(path)
        except Exception as error:
            self._give_up(path, f"{path} cannot be served: {error}")
            return
        if not self._on_trial():
            self._served = self._newest
        self._newest, self.problem = path, ""
        self._scheduler.roll_out(new)
        logger.info("%s is on trial", new.id)

    def _canary_failed(self, new: LoadedCheckpoint, problem: str) -> None:
        """The scheduler's word, from another thread: a trial has failed."""
        if self._newest != self._served:
            failed, self._newest = self._newest, self._served
            self._give_up(failed, f"{new.id} failed its trial: {problem}")

    def _give_up(self, path: str, problem: str) -> None:
        logger.error("%s", problem)
        self.problem = problem
        self._given_up = {path: time.monotonic() + AGAIN_S}
