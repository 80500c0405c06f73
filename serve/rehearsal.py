"""Pictures that a checkpoint paints for nobody: one before anybody may see it, and those of a trial that no visitor asks for."""

from __future__ import annotations

from dataclasses import replace

from momalisa.config import EVALUATION_PROMPTS, Serve
from momalisa.engine import Request
from serve import finishing
from serve.loaded_checkpoint import LoadedCheckpoint, request_of, requests_of
from serve.mailbox import Mailbox
from serve.sample import ActiveTask, Sample, samples_of
from serve.task import Event, GenerationTask


class Nobody(Mailbox):
    """Keeps nothing, and needs no event loop."""

    def __init__(self) -> None:
        return

    def post(self, event: Event) -> None:
        return


def task_of(limits: Serve, number: int) -> GenerationTask:
    """What a visitor could ask for who leaves every setting as it is."""
    prompt = EVALUATION_PROMPTS[number % len(EVALUATION_PROMPTS)]
    return GenerationTask(prompt, (number,), limits.steps, limits.guidance_scale, limits.size_px)


def sample_of(limits: Serve, number: int, now: float) -> Sample:
    """A sample that is in no line, and that nobody waits for: its task is closed, as if its visitor had left."""
    task = task_of(limits, number)
    [sample] = samples_of(ActiveTask(task, requests_of(task), Nobody(), now, closed=True))
    return sample


def warm_up(checkpoint: LoadedCheckpoint, limits: Serve) -> None:
    """Paint one whole picture with a preview, after steps with guidance and without.

    Raises GenerationError where it is none, ValueError for settings that cannot be.
    """
    task = task_of(limits, 0)
    first = [Request("", steps=1, size_px=limits.size_px, guidance_scale=scale) for scale in (1.0, 7.5)]
    whole = replace(request_of(task, 0), steps=max(2, limits.steps), previews=1)  # in a single step there is no preview
    picture = checkpoint.engine.generate([*first, whole])[-1]
    finishing.picture(task, 0, checkpoint, picture)
