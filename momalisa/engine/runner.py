"""The UNet in a few fixed shapes, so that it can be compiled and, on a GPU, replayed as CUDA graphs.

A batch of R rows is padded to the next bucket. `warm` compiles and captures every bucket at the sizes that will be asked
for; after that nothing is ever compiled again: what has no bucket (another size, more rows) runs as plain PyTorch. Compiled
kernels are kept in `cache_dir` (Inductor's on-disk cache), so that the next start only loads them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


class Runner:
    """Calls a UNet: latents [R, C, h, w], timesteps [R] and text states [R, L, D] -> its output [R, C, h, w] float32."""

    def __init__(self, unet: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.unet, self.device, self.dtype = unet, device, dtype
        self._format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._shapes: dict[tuple[int, ...], Any] = {}  # the latents' shape -> what is called for it

    @torch.no_grad()
    def warm(self, rows: int, places: Sequence[int], channels: int, text: Tensor, cache_dir: str | Path | None) -> None:
        """Compile for every bucket up to `rows` and every latent side of `places`. `text` [L, D]: states of any text."""
        if cache_dir is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir)
        torch.compiler.reset()
        options: dict[str, Any] = {"freezing": True} if self.device.type == "cpu" else {}
        for bucket in _buckets(rows):
            for side in places:
                call = torch.compile(_Call(self.unet), dynamic=False, fullgraph=True, options=options)
                latents = torch.zeros((bucket, channels, side, side), device=self.device, dtype=self.dtype)
                example = (
                    latents.to(memory_format=self._format),
                    torch.zeros(bucket, device=self.device),
                    text.to(self.device, self.dtype).expand(bucket, -1, -1).contiguous(),
                )
                call(*(value.clone() for value in example))
                self._shapes[bucket, channels, side, side] = _Graph(call, example) if self.device.type == "cuda" else call

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of latents that are compiled."""
        return list(self._shapes)

    def __call__(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        rows, latents = len(latents), latents.to(self.dtype, memory_format=self._format)
        shape = min((shape for shape in self._shapes if shape[0] >= rows and shape[1:] == latents.shape[1:]), default=None)
        if shape is None:
            output: Tensor = self.unet(latents, timesteps, encoder_hidden_states=states, return_dict=False)[0]
            return output.float()
        padded = (_padded(value, shape[0]) for value in (latents, timesteps, states))
        with torch.compiler.set_stance("eager_on_recompile"):
            padded_output: Tensor = self._shapes[shape](*padded)
        return padded_output[:rows].float()


class _Call(torch.nn.Module):
    """A UNet with positional arguments and one result."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        output: Tensor = self.unet(latents, timesteps, encoder_hidden_states=states, return_dict=False)[0]
        return output


class _Graph:
    """A CUDA graph of one shape, with buffers for what goes in and out."""

    def __init__(self, call: Any, example: tuple[Tensor, ...]) -> None:
        self._inputs = example
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
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
