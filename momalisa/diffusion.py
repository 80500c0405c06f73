"""Noise, timesteps and the training loss of a latent diffusion model.

Symbols: x0 clean latents, e noise, t timestep, abar(t) the cumulative product of 1 - beta.
    x_t = sqrt(abar) x0 + sqrt(1 - abar) e            (Ho et al. 2020, equation 4)
    loss = w(t) |e - e_theta(x_t, t, text)|^2,  w = min(SNR, gamma) / SNR   (Hang et al. 2023, equation 5)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler

from momalisa.config import Diffusion
from momalisa.weights import locate


@dataclass(frozen=True)
class Schedule:
    """A model's noise schedule. `alphas_cumprod` [T] float64 on the CPU."""

    alphas_cumprod: torch.Tensor

    @classmethod
    def load(cls, diffusion: Diffusion) -> Schedule:
        """From the base model's scheduler. Raises ValueError unless it predicts noise (epsilon)."""
        scheduler = DDPMScheduler.from_pretrained(locate(diffusion.model), subfolder="scheduler", revision=diffusion.revision)
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"diffusion.model {diffusion.model!r} predicts {scheduler.config.prediction_type!r}, not 'epsilon'")
        return cls(scheduler.alphas_cumprod.double())

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t [B, C, H, W] float32 from x0 and e of that shape and t [B]."""
        alphas = self.alphas_cumprod[timesteps.cpu()].to(latents.device, torch.float32).view(-1, 1, 1, 1)
        return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise

    def weights(self, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """Min-SNR weights [B] float32; ones where `gamma` is None."""
        if gamma is None:
            return torch.ones(len(timesteps))
        alphas = self.alphas_cumprod[timesteps.cpu()]
        snr = alphas / (1 - alphas)
        return (snr.clamp(max=gamma) / snr).float()


@dataclass(frozen=True)
class Draws:
    """Everything random about training samples; a function of (seed, epoch, sample id) alone."""

    latent_noise: torch.Tensor  # [B, C, H, W] float32: which latent of the posterior
    noise: torch.Tensor  # [B, C, H, W] float32
    timesteps: torch.Tensor  # [B] int64
    dropped: torch.Tensor  # [B] bool: train on the empty prompt


def generator(*key: object) -> torch.Generator:
    """A random source that is a function of its key, on any machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draws(seed: int, samples: list[tuple[int, str]], shape: tuple[int, ...], timesteps: int, dropout: float) -> Draws:
    """The draws of samples (epoch, id) for latents of `shape` [C, H, W], whatever else is in the batch."""
    rows: list[tuple[Any, ...]] = []
    for epoch, sample_id in samples:
        source = generator(seed, epoch, sample_id)
        rows.append(
            (
                torch.randn(shape, generator=source),
                torch.randn(shape, generator=source),
                torch.randint(0, timesteps, (), generator=source),
                torch.rand((), generator=source) < dropout,
            )
        )
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))


def loss_per_sample(predicted: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample [B] float32."""
    return (predicted.float() - noise).square().mean(dim=(1, 2, 3))
