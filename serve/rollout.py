"""Which checkpoint draws what: the main one, a new one in its canary, a challenger, and those that finish what they began.

    start(new) -> canary: a share of the tasks -> end(): the new one is the main one, or is given up

Plain data: whoever shares a rollout locks it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from serve.canary import Canary
from serve.loaded_checkpoint import LoadedCheckpoint
from serve.sample import Sample

logger = logging.getLogger(__name__)


class Rollout:
    """`main` draws whatever has no other checkpoint."""

    def __init__(self, main: LoadedCheckpoint, challenger: LoadedCheckpoint | None = None) -> None:
        self.main, self._challenger = main, challenger
        self.new: LoadedCheckpoint | None = None
        self.canary: Canary | None = None
        self.retiring: list[LoadedCheckpoint] = []
        self.unloaded = 0  # how many have been

    def checkpoints(self) -> list[LoadedCheckpoint]:
        """All that have an engine."""
        return [one for one in (self.main, self.new, self._challenger, *self.retiring) if one is not None]

    def start(self, new: LoadedCheckpoint, canary: Canary) -> None:
        """No other is on trial."""
        assert self.new is None
        self.new, self.canary = new, canary

    @property
    def challenger(self) -> LoadedCheckpoint | None:
        """What the main checkpoint may be compared with: the settings' choice, or else a new one in its canary."""
        chosen = self._challenger
        return chosen if chosen is not None and chosen.id != self.main.id else self.new

    def choose(self, sample: Sample) -> LoadedCheckpoint:
        """What draws a sample: all of a task have one checkpoint, but for comparisons."""
        active = sample.active
        if active.task.compare:
            return (sample.index == 1 and not sample.repeated and self.challenger) or self.main
        if active.checkpoint is None:
            canary = self.canary is not None and self.canary.next_is_new()
            active.checkpoint = (canary and self.new) or self.main
        return active.checkpoint if active.checkpoint in self.checkpoints() else self.main

    def fail(self, problem: str) -> None:
        """The canary, if there is one, will end badly."""
        if self.canary is not None:
            self.canary.fail(problem)

    def note_picture(self, checkpoint: LoadedCheckpoint) -> None:
        """A picture came."""
        if self.canary is not None and checkpoint is self.new:
            self.canary.pictures += 1

    def note_tick(self, checkpoint: LoadedCheckpoint, samples: Collection[Sample], rows: int, seconds: float) -> None:
        """A tick took `samples` a step on. Those with an adapter or an image, and reproducible ones, have work of their own."""
        tasks = [sample.active.task for sample in samples]
        special = any(task.adapter or task.image or task.reproducible for task in tasks)
        if self.canary is not None and tasks and not special and checkpoint in (self.new, self.main):
            self.canary.note_tick(checkpoint is self.new, tasks[0].size_px, rows, seconds)

    def decided(self, now: float) -> bool:
        """Whether the canary is to be ended."""
        return self.canary is not None and (bool(self.canary.problem) or self.canary.passed(now))

    def end(self) -> tuple[LoadedCheckpoint, Canary]:
        """The new checkpoint, which is the main one now unless its canary has a problem."""
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
        return new, canary

    def retire(self) -> None:
        """Close what has finished all that it began."""
        for one in [one for one in self.retiring if not one.running]:
            self.retiring.remove(one)
            one.engine.close()
            self.unloaded += 1
            logger.info("%s is unloaded", one.id)
