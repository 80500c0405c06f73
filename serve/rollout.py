"""Which checkpoint draws what: the main one, a new one in its canary, and those that finish what they began.

    start(new) -> canary: a share of the tasks -> end(): the new one is the main one, or is given up

Plain data: whoever shares a rollout locks it.
"""

from __future__ import annotations

import logging

from serve.canary import Canary
from serve.loaded_checkpoint import LoadedCheckpoint

logger = logging.getLogger(__name__)


class Rollout:
    """`main` draws whatever has no other checkpoint."""

    def __init__(self, main: LoadedCheckpoint) -> None:
        self.main = main
        self.new: LoadedCheckpoint | None = None
        self.canary: Canary | None = None
        self.retiring: list[LoadedCheckpoint] = []

    def checkpoints(self) -> list[LoadedCheckpoint]:
        """All that have an engine."""
        return [one for one in (self.main, self.new, *self.retiring) if one is not None]

    def start(self, new: LoadedCheckpoint, canary: Canary) -> None:
        """The caller has ended the one before."""
        self.new, self.canary = new, canary

    def choose(self) -> LoadedCheckpoint:
        """For the next task."""
        return self.new if self.new is not None and self.canary is not None and self.canary.next_is_new() else self.main

    def still(self, checkpoint: LoadedCheckpoint) -> LoadedCheckpoint:
        """The checkpoint that a task began with, or the main one where that is no longer loaded."""
        return checkpoint if checkpoint in self.checkpoints() else self.main

    def fail(self, problem: str) -> None:
        """The canary, if there is one, will end badly."""
        if self.canary is not None:
            self.canary.fail(problem)

    def note_picture(self, checkpoint: LoadedCheckpoint, step_s: float) -> None:
        """A picture came, after so many seconds a step."""
        if self.canary is not None and checkpoint in (self.new, self.main):
            self.canary.note_picture(checkpoint is self.new, step_s)

    def decided(self, now: float) -> bool:
        """Whether the canary is to be ended."""
        return self.canary is not None and (bool(self.canary.problem) or self.canary.passed(now))

    def end(self) -> tuple[LoadedCheckpoint, str]:
        """The new checkpoint, and why it is given up, or an empty string: it is the main one now."""
        new, canary = self.new, self.canary
        assert new is not None
        assert canary is not None
        self.new = self.canary = None
        if canary.problem:
            logger.error("%s is given up: %s", new.id, canary.problem)
            self.retiring.append(new)
        else:
            logger.info("%s takes over from %s", new.id, self.main.id)
            self.retiring.append(self.main)
            self.main = new
        return new, canary.problem

    def retire(self) -> None:
        """Close what has finished all that it began."""
        for one in [one for one in self.retiring if not one.running]:
            self.retiring.remove(one)
            one.engine.close()
            logger.info("%s is unloaded", one.id)
