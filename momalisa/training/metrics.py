"""What a run says of itself between two log lines, summed on the device: a step never waits for a number."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

BINS = 4
# Dense peak in TFLOP/s, bf16 with fp32 accumulation, from NVIDIA's data sheets.
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A40": 150, "A10": 125, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 6000 Ada": 364, "RTX A6000": 155, "4090": 165, "3090": 71,
}  # fmt: skip


class Meter:
    """Sums since the last log: losses by bin of timesteps, images, seconds, and seconds that the step waited for data."""

    def __init__(self, timesteps: int, device: torch.device, peak_tflops: float | None) -> None:
        """`peak_tflops`: of one accelerator; None: no MFU."""
        self.timesteps, self.device, self.peak_tflops = timesteps, device, peak_tflops
        self.forward_flops = 0  # of this worker's samples; a backward pass counts as two forward ones
        self.reset()

    def reset(self) -> None:
        self.bins = torch.zeros(2, BINS, device=self.device)  # loss sums, counts
        self.images, self.waited_s, self.began = 0, 0.0, time.monotonic()
        self.forward_flops = 0

    def losses(self, timesteps: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor) -> None:
        """Add samples [B]; those without weight do not count."""
        counts = (weights > 0).float()
        places = timesteps * BINS // self.timesteps
        self.bins[0].index_add_(0, places, losses.detach() * counts)
        self.bins[1].index_add_(0, places, counts)

    def read(self, bins: torch.Tensor, workers: int) -> dict[str, float]:
        """The figures of the whole group, given its summed bins [2, BINS]."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        found = {
            "images_per_s": self.images / elapsed,
            "data_wait_fraction": self.waited_s / elapsed,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        if self.peak_tflops and self.forward_flops:
            found["mfu"] = 3 * self.forward_flops / elapsed / (self.peak_tflops * 1e12)
        edges = [self.timesteps * place // BINS for place in range(BINS + 1)]
        for low, high, total, count in zip(edges, edges[1:], *bins.tolist(), strict=False):
            if count:
                found[f"loss_t{low:03d}_{high - 1:03d}"] = total / count
        return found


def known_peak(device: torch.device, precision: str) -> float | None:
    """TFLOP/s of a GPU that we know, in 16 bits; None for others and for fp32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held: of the accelerator's memory, or of the machine's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass
class Flops:
    """Floating point operations of a UNet's forward pass, a sample, by shape; counted on the meta device."""

    config: dict[str, Any]

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, ...], int] = {}

    def __call__(self, shape: tuple[int, ...], tokens: int) -> int:
        """For latents of `shape` [C, H, W]."""
        if shape not in self._known:
            self._known[shape] = self._count(shape, tokens)
        return self._known[shape]

    def _count(self, shape: tuple[int, ...], tokens: int) -> int:
        from diffusers import UNet2DConditionModel
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self.config)
            counter = FlopCounterMode(display=False)
            width = self.config["cross_attention_dim"]
            with torch.no_grad(), counter:
                unet(torch.empty(1, *shape), torch.empty(1, dtype=torch.int64), torch.empty(1, tokens, width))
        return int(counter.get_total_flops())
