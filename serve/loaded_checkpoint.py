"""A checkpoint that is ready: its weights in an engine, and the samples that the engine is drawing."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

from PIL import Image

from momalisa.engine import Engine, Request
from momalisa.engine.tiers import at_tier
from serve.sample import Sample
from serve.task import GenerationTask

PictureCheck = Callable[[Image.Image], str | None]


class LoadedCheckpoint:
    """`running`: the samples in the engine's batch, by the engine's numbers; the scheduler keeps them.

    `path`: the checkpoint's, as refs/best names it; `check`: what finished pictures must pass; `problem`: what is not as the
    settings want it, or an empty string.
    """

    def __init__(self, engine: Engine, id_: str, path: str, check: PictureCheck | None = None, problem: str = "") -> None:
        self.engine, self.id, self.path, self.check, self.problem = engine, id_, path, check, problem
        self.running: dict[int, Sample] = {}
        self.pending_row_steps = 0
        self.decoding: frozenset[int] = frozenset()

    @property
    def rows(self) -> int:
        """Rows of the UNet's batch that its samples take; one that is only decoded yet takes none."""
        return sum(sample.rows for id_, sample in self.running.items() if id_ not in self.decoding)

    def count(self) -> None:
        """Note how much work is left, for threads that may not ask the engine, and which samples need no rows any more."""
        self.pending_row_steps, self.decoding = self.engine.pending_row_steps, self.engine.decoding

    def start(self, sample: Sample) -> None:
        """Put a sample into the engine's batch. Raises ValueError for a request that cannot be."""
        sample.id = self.engine.submit(sample.active.requests[sample.index])
        sample.checkpoint = self
        self.running[sample.id] = sample
        self.count()

    def cancel(self, sample: Sample) -> None:
        """Give a sample's rows back; one that is not running stays as it is."""
        if self.running.pop(sample.id, None) is not None:
            self.engine.cancel(sample.id)
            self.count()


def request_of(task: GenerationTask, index: int) -> Request:
    """The engine's request for one of a task's seeds."""
    return requests_of(task)[index]


def requests_of(task: GenerationTask) -> list[Request]:
    """The engine's requests, one for each seed; pictures are decoded, once for all."""
    request = Request(
        prompt=task.prompt,
        steps=task.steps,
        guidance_scale=task.guidance_scale,
        negative_prompt=task.negative_prompt,
        size_px=task.size_px,
        sampler=task.sampler,
        image=_opened(task.image, "RGB"),
        strength=task.strength,
        mask=_opened(task.mask, "L"),
        previews=task.previews,
        reproducible=task.reproducible,
        adapter=task.adapter,
    )
    return [at_tier(replace(request, seed=seed), task.tier) for seed in task.seeds]


def _opened(data: bytes | None, mode: str) -> Image.Image | None:
    return None if data is None else Image.open(io.BytesIO(data)).convert(mode)
