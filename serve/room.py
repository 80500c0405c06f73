"""GPU memory for one more checkpoint. It is asked for before anything is loaded: where memory runs out while two are there,
visitors' pictures fail with it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class Room:
    """What this process took to load the last checkpoint is what the next one needs. On a CPU nothing is asked."""

    def __init__(self, device: str) -> None:
        self._gpu = device == "cuda"
        self._needed = 0  # bytes: weights, graphs, and what PyTorch kept of the warm-up

    @contextmanager
    def for_checkpoint(self) -> Iterator[None]:
        """Around the loading of one. Raises ValueError where fewer bytes are free than one has taken."""
        if not self._gpu:
            yield
            return
        tidy()
        free, reserved = _free(), torch.cuda.memory_reserved()
        if free < self._needed:
            raise ValueError(
                f"there is no GPU memory for a second checkpoint: {free / GIB:.2f} GiB are free, and one took "
                f"{self._needed / GIB:.2f} GiB; try a smaller serve.max_rows, no serve.challenger, a GPU with more, or "
                "serve.watch_s=0 and a new `release`"
            )
        yield
        self._needed = torch.cuda.memory_reserved() - reserved


def tidy() -> None:
    """Give back what nothing uses any more: compiled models lie in cycles, and PyTorch keeps what is freed for itself."""
    gc.collect()
    torch.cuda.empty_cache()


def _free() -> int:
    """Bytes of the GPU that nobody has, whatever their process."""
    return int(torch.cuda.mem_get_info()[0])
