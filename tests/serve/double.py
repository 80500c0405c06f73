"""An engine that follows the real one's contract, without a model: for what must be counted, broken or slowed down."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from momalisa.engine import Broken, Done, GenerationError, Preview, Request
from serve.loaded_checkpoint import LoadedCheckpoint

Spoil = Callable[[Request], Any]


def drawn(seed: int, size_px: int = 16) -> Image.Image:
    """A picture that is not flat, and another one for each seed."""
    picture = Image.new("RGB", (size_px, size_px), (seed % 256, 10, 20))
    picture.putpixel((0, 0), (255, 255, 255))
    return picture


class Engine:
    """Every request takes a step a tick. `spoil(request)`: a picture or an error instead of the usual picture.

    Pictures come so many ticks after their last step as `decode_ticks` says.
    """

    def __init__(self, spoil: Spoil | None = None, tick_s: float = 0.001) -> None:
        self.decode_ticks = 0
        self.flying: dict[int, tuple[Request, int]] = {}
        self.spoil, self.tick_s = spoil, tick_s
        self.finished: dict[int, tuple[Request, int]] = {}
        self.submitted: list[Request] = []
        self.cancelled: list[int] = []
        self.rows_of_ticks: list[int] = []
        self.paused = self.closed = False
        self.stepped: list[int] = []

    @property
    def rows(self) -> int:
        return sum(2 if request.guidance_scale > 1 else 1 for request, _ in self.flying.values())

    @property
    def pending_row_steps(self) -> int:
        return sum((2 if one.guidance_scale > 1 else 1) * (one.steps - done) for one, done in self.flying.values())

    @property
    def decoding(self) -> frozenset[int]:
        return frozenset(self.finished)

    def submit(self, request: Request) -> int:
        if request.prompt.endswith("impossible"):
            raise ValueError("this cannot be")
        self.submitted.append(request)
        self.flying[len(self.submitted)] = (request, 0)
        return len(self.submitted)

    def cancel(self, id_: int) -> bool:
        self.cancelled.append(id_)
        return (self.flying.pop(id_, None) or self.finished.pop(id_, None)) is not None

    def close(self) -> None:
        self.closed = True

    def tick(self) -> list[Any]:
        time.sleep(self.tick_s)
        self.stepped = [] if self.paused else list(self.flying)
        if self.paused:
            return []
        self.rows_of_ticks.append(self.rows)
        events: list[Any] = []
        for id_, (request, done) in list(self.flying.items()):
            self.flying[id_] = (request, done + 1)
            if done + 1 < request.steps:
                if request.previews:
                    events.append(Preview(id_, drawn(request.seed), done + 1, request.steps))
                continue
            del self.flying[id_]
            self.finished[id_] = (request, self.decode_ticks)
        for id_, (request, left) in list(self.finished.items()):
            self.finished[id_] = (request, left - 1)
            if left > 0:
                continue
            del self.finished[id_]
            made = self.spoil(request) if self.spoil else None
            events.append(Broken(id_, made) if isinstance(made, Exception) else Done(id_, made or drawn(request.seed)))
        return events


def loaded(name: str = "old-1", spoil: Spoil | None = None, tick_s: float = 0.001) -> LoadedCheckpoint:
    made: Any = Engine(spoil, tick_s)
    return LoadedCheckpoint(made, name, f"checkpoints/{name}")


def nan(request: Request) -> Exception:
    return GenerationError("the UNet produced NaN")


def black(request: Request) -> Image.Image:
    return Image.new("RGB", (16, 16))
