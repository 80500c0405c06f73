"""Finished latents -> pictures, several at once and beside the UNet's steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from momalisa.engine.events import Broken, Done, Event, GenerationError
from momalisa.engine.request import Request
from momalisa.latents import Autoencoder, to_pictures

FEW, PATIENCE = 4, 4


@dataclass(frozen=True, eq=False)
class Finished:
    """A trajectory's last latents [C, h, w] float32."""

    id: int
    request: Request
    latents: Tensor


@dataclass(frozen=True, eq=False)
class Decoded:
    """Pixels [B, 3, H, W] and, of latents and of pixels, which are finite [2, B]; both on the CPU once `ready`."""

    items: Sequence[Finished]
    pixels: Tensor
    finite: Tensor
    ready: Callable[[], bool]

    def outcomes(self) -> list[Done | Broken]:
        latents, pixels = self.finite.tolist()
        pictures = to_pictures(self.pixels)
        return [
            Done(item.id, picture) if good and sound else Broken(item.id, _error("the autoencoder" if good else "the UNet", item))
            for item, picture, good, sound in zip(self.items, pictures, latents, pixels, strict=True)
        ]


class Decoder:
    """A line of finished latents. On a GPU they are decoded in a stream of their own; on a CPU, a few between two steps.

    Alone a picture takes a CPU 1.7 times as long as among `FEW` (the miniature's autoencoder). So while more pictures are
    being drawn than could be, who is finished waits `PATIENCE` steps for a few others; while there is room, for nobody.
    """

    def __init__(self, autoencoder: Autoencoder, device: torch.device, most: int) -> None:
        self.autoencoder, self.most = autoencoder, most
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: deque[Finished] = deque()
        self._running: deque[Decoded] = deque()
        self._ids: set[int] = set()
        self._waited = 0  # polls since the last start

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def ids(self) -> frozenset[int]:
        """Of those in line and those that are being decoded."""
        return frozenset(self._ids)

    def add(self, finished: Iterable[Finished]) -> None:
        for item in finished:
            self._waiting.append(item)
            self._ids.add(item.id)

    def cancel(self, id_: int) -> bool:
        """Whether there was such a request; its picture is not spoken of again."""
        found = id_ in self._ids
        self._ids.discard(id_)
        self._waiting = deque(item for item in self._waiting if item.id != id_)
        return found

    def poll(self, wait: bool, full: bool = False) -> list[Event]:
        """Start on the next few; what is ready. `wait`: nothing else is to be done, so those that run are waited for.

        `full`: no other picture could be drawn beside those that are.
        """
        events: list[Event] = []
        if self._waiting and self._due(full and not wait):
            part = self._next()
            try:
                self._running.append(self._start(part))
            except RuntimeError as error:  # what a device refuses: memory above all
                events += [Broken(item.id, error) for item in part if item.id in self._ids]
        if wait and self._stream is not None:
            self._stream.synchronize()
        while self._running and self._running[0].ready():
            events += [event for event in self._running.popleft().outcomes() if event.id in self._ids]
        self._ids.difference_update(event.id for event in events)
        return events

    def _due(self, full: bool) -> bool:
        self._waited += 1
        due = self._stream is not None or not full or len(self._waiting) >= FEW or self._waited > PATIENCE
        self._waited = 0 if due else self._waited
        return due

    def _next(self) -> list[Finished]:
        """The first in line and those that fit with it; a reproducible one is decoded alone."""
        first = self._waiting[0]
        kind = first.request.size_px
        alike = [item for item in self._waiting if item.request.size_px == kind and not item.request.reproducible]
        part = [first] if first.request.reproducible else alike[: self.most]
        self._waiting = deque(item for item in self._waiting if item not in part)
        return part

    def _start(self, items: Sequence[Finished]) -> Decoded:
        latents = torch.stack([item.latents for item in items])
        if self._stream is None:
            return Decoded(items, *self._decode(latents), ready=lambda: True)
        self._stream.wait_stream(torch.cuda.current_stream(latents.device))
        latents.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            pixels, finite = (_to_host(value) for value in self._decode(latents))
            done = torch.cuda.Event()
            done.record()
        return Decoded(items, pixels, finite, ready=done.query)

    def _decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.autoencoder.decode(latents)
        return pixels, torch.stack([torch.isfinite(values).flatten(1).all(1) for values in (latents, pixels)])


def _to_host(values: Tensor) -> Tensor:
    """A copy in pinned memory that does not hold up the stream."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def _error(part: str, item: Finished) -> GenerationError:
    seed = item.request.seed
    return GenerationError(f"{part} produced NaN or infinity (seed {seed}): the weights are damaged, or try precision fp32")
