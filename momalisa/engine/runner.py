"""The UNet in a few fixed shapes, so that it can be compiled and, on a GPU, replayed as CUDA graphs.

A batch of R rows is padded to the next bucket. `warm` compiles and captures every bucket at the sizes that will be asked
for; after that nothing is ever compiled again: what has no bucket (another size, more rows) runs as plain PyTorch. Compiled
kernels are kept in `cache_dir` (Inductor's on-disk cache), so that the next start only loads them.

torch.compile is not made for one thread that compiles while another one calls what was compiled: PyTorch's tracer and
`set_stance` change the whole process. So one thread at a time is in there. Who finds another one there draws with plain PyTorch.
CUDA graphs are replayed without any of it.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
_compiler = threading.Lock()  # held by the thread that compiles, or calls what was compiled
_calls = count()


class Runner:
    """Calls a UNet: latents [R, C, h, w], timesteps [R] and text states [R, L, D] -> its output [R, C, h, w] float32."""

    def __init__(self, unet: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.unet, self.device, self.dtype = unet, device, dtype
        self._plain = _plain(unet)
        self._format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._shapes: dict[tuple[int, ...], Any] = {}  # the latents' shape -> what is called for it

    @torch.no_grad()
    def warm(self, rows: int, places: Sequence[int], channels: int, text: Tensor, cache_dir: str | Path | None) -> None:
        """Compile for every bucket up to `rows` and every latent side of `places`. `text` [L, D]: states of any text.

        All shapes or, where the compiler fails, none. On a GPU their graphs share their memory: the largest is captured first,
        and what a graph gives is copied before the next one is replayed, so any order will do.
        """
        if cache_dir is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir)
        options: dict[str, Any] = {"freezing": True} if self.device.type == "cpu" else {}
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        shapes = [(bucket, channels, side, side) for bucket in _buckets(rows) for side in places]
        made: dict[tuple[int, ...], Any] = {}
        for shape in sorted(shapes, key=math.prod, reverse=True):
            began = time.monotonic()
            call = torch.compile(_plain(self.unet), dynamic=False, fullgraph=True, options=options)
            example = self._example(shape, text)
            with _compiler:
                call(*(value.clone() for value in example))
                made[shape] = self._ready(call, example, pool)
            seconds = time.monotonic() - began
            logger.info("compiled %d of %d shapes: latents %s, %.0f s", len(made), len(shapes), list(shape), seconds)
        self._shapes = made

    def _example(self, shape: tuple[int, ...], text: Tensor) -> tuple[Tensor, ...]:
        """What the UNet is called with at a shape: memory of its own, for a graph's inputs lie there."""
        return (
            torch.zeros(shape, device=self.device, dtype=self.dtype).to(memory_format=self._format),
            torch.zeros(shape[0], device=self.device),
            text.to(self.device, self.dtype).repeat(shape[0], 1, 1),
        )

    def _ready(self, call: Forward, example: tuple[Tensor, ...], pool: Any) -> Any:
        """What is called for a shape that is compiled."""
        return _Graph(call, example, pool) if self.device.type == "cuda" else _Alone(call, self._plain)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of latents that are compiled."""
        return sorted(self._shapes)

    def __call__(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        rows, latents = len(latents), latents.to(self.dtype, memory_format=self._format)
        shape = min((shape for shape in self._shapes if shape[0] >= rows and shape[1:] == latents.shape[1:]), default=None)
        if shape is None:
            return self._plain(latents, timesteps, states).float()
        padded = (_padded(value, shape[0]) for value in (latents, timesteps, states))
        padded_output: Tensor = self._shapes[shape](*padded)
        return padded_output[:rows].float()


def _plain(unet: Any) -> Forward:
    """A UNet with positional arguments and one result.

    Each has a code object of its own: torch.compile keeps what it has compiled with the code object, and no more than eight
    versions of one; and so what was compiled goes when the function goes, and nothing else does.
    """

    def forward(latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        output: Tensor = unet(latents, timesteps, encoder_hidden_states=states, return_dict=False)[0]
        return output

    forward.__code__ = forward.__code__.replace(co_name=f"forward_{next(_calls)}")
    return forward


class _Alone:
    """A compiled function, or the plain one while another thread compiles."""

    def __init__(self, compiled: Forward, plain: Forward) -> None:
        self._compiled, self._plain = compiled, plain

    def __call__(self, *values: Tensor) -> Tensor:
        if not _compiler.acquire(blocking=False):
            return self._plain(*values)
        try:
            with torch.compiler.set_stance("eager_on_recompile"):
                return self._compiled(*values)
        finally:
            _compiler.release()


class _Graph:
    """A CUDA graph of one shape, with buffers for what goes in and out; what lies between is the `pool`'s, for all graphs."""

    def __init__(self, call: Any, example: tuple[Tensor, ...], pool: Any) -> None:
        self._inputs = example
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):  # others draw meanwhile
            self._output = call(*self._inputs)

    def __call__(self, *values: Tensor) -> Tensor:
        for buffer, value in zip(self._inputs, values, strict=True):
            buffer.copy_(value)
        self._graph.replay()
        result: Tensor = self._output.clone()
        return result


def _buckets(rows: int) -> list[int]:
    """Those up to `rows`, and `rows` itself."""
    return [*(bucket for bucket in BUCKETS if bucket < rows), rows]


def _padded(values: Tensor, rows: int) -> Tensor:
    """Rows of zeros at the end. A row's result does not depend on them."""
    missing = rows - len(values)
    return values if not missing else torch.cat([values, values.new_zeros((missing, *values.shape[1:]))])
