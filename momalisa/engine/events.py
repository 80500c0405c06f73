"""What a tick of the engine has to say about requests."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


class GenerationError(ArithmeticError):
    """The model computed something that is no picture (NaN or infinity)."""


@dataclass(frozen=True)
class Preview:
    """A rough picture of where a request is going, in its full size."""

    id: int
    picture: Image.Image
    done: int  # sampler steps
    total: int


@dataclass(frozen=True)
class Done:
    """The last word on a request: its RGB picture."""

    id: int
    picture: Image.Image


@dataclass(frozen=True)
class Broken:
    """The last word on a request of which no picture came."""

    id: int
    error: Exception


Event = Preview | Done | Broken
