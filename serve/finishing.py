"""From the engine's pictures to what a visitor gets: checked, encoded, and saying how they were made. Beside the engine."""

from __future__ import annotations

from typing import Any

from PIL import Image

from momalisa.engine import Done, GenerationError, Preview, to_parameters
from serve import png
from serve.loaded_checkpoint import LoadedCheckpoint, request_of
from serve.sample import Sample
from serve.task import GenerationTask, Picture, Progress


def finished(sample: Sample, checkpoint: LoadedCheckpoint, event: Preview | Done) -> Picture | Progress:
    """Raises GenerationError for a picture that is none."""
    if isinstance(event, Preview):
        return Progress(sample.index, event.done, event.total, png.encode(event.picture, {}))
    return picture(sample.active.task, sample.index, checkpoint, event.picture)


def picture(task: GenerationTask, index: int, checkpoint: LoadedCheckpoint, image: Image.Image) -> Picture:
    """A PNG that says how it was made, or why it is withheld. Raises GenerationError for one flat colour."""
    if all(low == high for low, high in extrema(image)):
        raise GenerationError("the picture is one flat colour: the weights are damaged, or try precision fp32")
    if checkpoint.check is not None and (reason := checkpoint.check(image)):
        return Picture(index, None, checkpoint.id, reason)
    fields = to_parameters(request_of(task, index))
    if not task.compare:  # a vote is blind, for readers of files too
        fields["checkpoint"] = checkpoint.id
    if task.tier != "full":
        fields["tier"] = task.tier
    return Picture(index, png.encode(image, fields), checkpoint.id)


def extrema(image: Image.Image) -> list[tuple[int, int]]:
    """Lowest and highest value of each channel."""
    found: Any = image.convert("RGB").getextrema()
    return list(found)
