"""The evidence that chooses a checkpoint: loss on works it never saw, and distance to the collection.

- `held_out_losses`: the training loss on a fixed grid of held-out works x timesteps x stored noise. Every
  checkpoint meets the same noise, so differences are paired; their confidence interval is bootstrapped over works.
- `mmd2`: squared maximum mean discrepancy between two sets of pictures in CLIP's feature space, the unbiased
  estimate (Gretton et al. 2012, equation 3) with the Gaussian kernel of CMMD (Jayasumana et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from momalisa.diffusion import Schedule, generator, loss_per_sample
from momalisa.latents import TextEncoder, sample
from momalisa.training.cache import LatentCache
from momalisa.weights import locate

KERNEL_BANDWIDTH = 10.0  # of the Gaussian, on unit-length CLIP features, as CMMD fixes it
MMD_SCALE = 1000.0  # CMMD's: readable numbers
GRID_SEED = 1929


@torch.no_grad()
def held_out_losses(
    unet: Any,
    schedule: Schedule,
    text_encoder: TextEncoder,
    scaling_factor: float,
    cache: LatentCache,
    timesteps: int,
    batch: int,
) -> np.ndarray:
    """Mean squared noise error of each held-out work over `timesteps` even timesteps: [N] float64.

    The noise of a (work, timestep) is a function of its id, the same for every checkpoint.
    """
    device = next(unet.parameters()).device
    grid = [round((i + 0.5) * len(schedule) / timesteps) for i in range(timesteps)]
    losses = np.zeros((len(cache), timesteps))
    for bucket in cache.buckets():
        cells = [(row, place) for row in bucket for place in range(timesteps)]
        for start in range(0, len(cells), batch):
            part = cells[start : start + batch]
            rows, t = cache.rows([row for row, _ in part]), torch.tensor([grid[place] for _, place in part])
            shape = (rows.moments[0].shape[0] // 2, *rows.moments[0].shape[1:])
            sources = [generator(GRID_SEED, sample_id, step) for sample_id, step in zip(rows.ids, t.tolist(), strict=True)]
            latents = sample(rows.stacked(), torch.stack([torch.randn(shape, generator=s) for s in sources]), scaling_factor)
            noise = torch.stack([torch.randn(shape, generator=s) for s in sources])
            text = text_encoder.embed(rows.token_ids.to(device))
            predicted = unet(schedule.add_noise(latents, noise, t).to(device), t.to(device), text).sample
            row_places, column_places = zip(*part, strict=True)
            target = schedule.target(latents, noise, t).to(device)
            losses[list(row_places), list(column_places)] = loss_per_sample(predicted, target).cpu().double().numpy()
    averaged: np.ndarray = losses.mean(axis=1)
    return averaged


@dataclass(frozen=True)
class Difference:
    """A mean, or a paired difference of means (candidate - base), and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def interval(values: np.ndarray, resamples: int = 10_000) -> Difference:
    """The mean of values [N] and its interval (Efron 1979, percentiles). Raises ValueError where there are none."""
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values [N] are needed, got shape {values.shape}")
    picks = np.random.default_rng(GRID_SEED).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return Difference(float(values.mean()), float(low), float(high))


def paired_difference(base: np.ndarray, candidate: np.ndarray, resamples: int = 10_000) -> Difference:
    """Losses of the same works [N] under two models."""
    if base.shape != candidate.shape or base.ndim != 1 or not len(base):
        raise ValueError(f"losses of the same works are needed, got shapes {base.shape} and {candidate.shape}")
    return interval(candidate - base, resamples)


class ClipFeatures:
    """CLIP's image embeddings, unit length."""

    def __init__(self, model: str, revision: str | None, device: torch.device | str = "cpu") -> None:
        self.model = CLIPModel.from_pretrained(locate(model), revision=revision, torch_dtype=torch.float32).to(device).eval()
        self.processor = CLIPImageProcessorPil.from_pretrained(locate(model), revision=revision)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], batch: int = 50) -> np.ndarray:
        """Pictures -> [N, D] float64."""
        parts = []
        for start in range(0, len(pictures), batch):
            pixels = self.processor(images=list(pictures[start : start + batch]), return_tensors="pt")["pixel_values"]
            vision = self.model.vision_model(pixel_values=pixels.to(self.model.device))
            features = self.model.visual_projection(vision.pooler_output)
            parts.append(torch.nn.functional.normalize(features, dim=-1).cpu().double())
        return torch.cat(parts).numpy()


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD^2 x 1000 between features [N, D] and [M, D]; about 0, or below, for two samples of one thing.

    (1/n(n-1)) sum_{i != j} k(xi, xj) + (1/m(m-1)) sum_{i != j} k(yi, yj) - (2/nm) sum_ij k(xi, yj)
    """
    n, m = len(x), len(y)
    if n < 2 or m < 2:
        raise ValueError(f"two pictures on each side are needed, got {n} and {m}")
    within_x = (_kernel(x, x).sum() - n) / (n * (n - 1))
    within_y = (_kernel(y, y).sum() - m) / (m * (m - 1))
    return float(MMD_SCALE * (within_x + within_y - 2 * _kernel(x, y).mean()))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2 * x @ y.T
    kernel: np.ndarray = np.exp(-squared.clip(min=0) / (2 * KERNEL_BANDWIDTH**2))
    return kernel
