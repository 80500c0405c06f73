"""What passes between the HTTP layer and a generator: a commission one way, pictures or a reason the other way.

Plain data, so that the HTTP layer needs no torch and its tests need no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Commission:
    """A visitor's order: one picture for each seed."""

    prompt: str  # complete, with the prefix
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    size_px: int
    negative_prompt: str = ""


@dataclass(frozen=True)
class Painted:
    """PNG files in the order of the seeds, and the checkpoint that made them."""

    pngs: tuple[bytes, ...]
    checkpoint: str


@dataclass(frozen=True)
class Busy:
    """The line is full; a place is likely free after this long."""

    retry_after_s: int


@dataclass(frozen=True)
class Failed:
    """The commission was right but no picture came of it; the message is for the visitor."""

    message: str
    retry: bool = False  # the generator is starting or was lost: the same request may succeed soon


Outcome = Painted | Busy | Failed


class Backend(Protocol):
    """What the HTTP layer needs: a generator in this process, or a handle to replicas elsewhere."""

    async def paint(self, commission: Commission) -> Outcome:
        """Does not raise for anything a visitor can send."""

    async def checkpoint(self) -> str:
        """The served checkpoint's id, from a live generator. Raises Unavailable."""


class Unavailable(RuntimeError):
    """No generator answers."""
