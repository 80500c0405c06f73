"""Noise, timesteps and the training loss of a latent diffusion model.

Symbols: x0 clean latents, e noise, t timestep, abar(t) the cumulative product of 1 - beta, SNR = abar / (1 - abar).
    x_t = sqrt(abar) x0 + sqrt(1 - abar) e            (Ho et al. 2020, equation 4)
    v = sqrt(abar) e - sqrt(1 - abar) x0              (Salimans & Ho 2022, appendix D)
    loss = w(t) |target - model(x_t, t, text)|^2      target e: w = min(SNR, gamma) / SNR        (Hang et al. 2023, equation 5)
                                                      target v: w = min(SNR, gamma) / (SNR + 1)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler

from momalisa.config import Diffusion
from momalisa.weights import locate

PREDICTIONS = ("epsilon", "v_prediction")
ZERO_TERMINAL_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""How diffusers' schedulers sample a model trained with zero_terminal_snr: on its own schedule, and beginning with the last
timestep, noise alone (Lin et al. 2024, sections 3.1 and 3.3)."""


@dataclass(frozen=True)
class Schedule:
    """A model's noise schedule and what it predicts. `alphas_cumprod` [T] float64 on the CPU."""

    alphas_cumprod: torch.Tensor
    prediction: str = "epsilon"

    @classmethod
    def load(cls, diffusion: Diffusion, zero_terminal_snr: bool = False) -> Schedule:
        """From the base model's scheduler. Raises ValueError for one that predicts neither noise nor v, or for
        `zero_terminal_snr` and a model that predicts noise."""
        scheduler = DDPMScheduler.from_pretrained(locate(diffusion.model), subfolder="scheduler", revision=diffusion.revision)
        prediction, alphas = str(scheduler.config.prediction_type), scheduler.alphas_cumprod.double()
        if prediction not in PREDICTIONS:
            known = " or ".join(map(repr, PREDICTIONS))
            raise ValueError(f"diffusion.model {diffusion.model!r} predicts {prediction!r}, not {known}")
        if zero_terminal_snr and prediction != "v_prediction":
            raise ValueError(
                f"train.zero_terminal_snr: diffusion.model {diffusion.model!r} predicts {prediction!r}, and from noise alone "
                "there is nothing to learn about noise; set it to false, or take a model of v such as Stable Diffusion 2.1"
            )
        return cls(without_terminal_signal(alphas) if zero_terminal_snr else alphas, prediction)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t [B, C, H, W] float32 from x0 and e of that shape and t [B]."""
        alphas = self.alphas_cumprod[timesteps.cpu()].to(latents.device, torch.float32).view(-1, 1, 1, 1)
        return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model is to predict, e or v: [B, C, H, W] float32."""
        if self.prediction == "epsilon":
            return noise
        alphas = self.alphas_cumprod[timesteps.cpu()].to(latents.device, torch.float32).view(-1, 1, 1, 1)
        return alphas.sqrt() * noise - (1 - alphas).sqrt() * latents

    def weights(self, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """Min-SNR weights [B] float32; ones where `gamma` is None."""
        if gamma is None:
            return torch.ones(len(timesteps))
        alphas = self.alphas_cumprod[timesteps.cpu()]
        snr = alphas / (1 - alphas)
        return (snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)).float()


def without_terminal_signal(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """sqrt(abar) shifted to 0 at its end and scaled to what it was at its start (Lin et al. 2024, algorithm 1): [T]."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * first / (first - last)).square()


@dataclass(frozen=True)
class Draws:
    """Everything random about training samples; a function of (seed, epoch, sample id) alone."""

    latent_noise: torch.Tensor  # [B, C, H, W] float32: which latent of the posterior
    noise: torch.Tensor  # [B, C, H, W] float32
    timesteps: torch.Tensor  # [B] int64
    dropped: torch.Tensor  # [B] bool: train on the empty prompt
    prompts: torch.Tensor  # [B] int64, 0..2^31-1: which general prompt stands beside the sample
    flipped: torch.Tensor  # [B] bool: train on the mirror image, with `train.flip`


def generator(*key: object) -> torch.Generator:
    """A random source that is a function of its key, on any machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draws(
    seed: int, samples: list[tuple[int, str]], shape: tuple[int, ...], timesteps: int, dropout: float, offset: float = 0.0
) -> Draws:
    """The draws of samples (epoch, id) for latents of `shape` [C, H, W], whatever else is in the batch.

    `offset`: the share of noise that is constant over a channel, added to the other.
    """
    rows: list[tuple[Any, ...]] = []  # in an order that stays: a run that goes on draws what it would have drawn
    for epoch, sample_id in samples:
        source = generator(seed, epoch, sample_id)
        rows.append(
            (
                torch.randn(shape, generator=source),
                torch.randn(shape, generator=source),
                torch.randint(0, timesteps, (), generator=source),
                torch.rand((), generator=source) < dropout,
                torch.randint(0, 2**31, (), generator=source),
                torch.randn((shape[0], 1, 1), generator=source),
                torch.rand((), generator=source) < 0.5,
            )
        )
    latent_noise, noise, steps, dropped, prompts, constant, flipped = (torch.stack(column) for column in zip(*rows, strict=True))
    return Draws(latent_noise, noise + offset * constant if offset else noise, steps, dropped, prompts, flipped)


def loss_per_sample(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample [B] float32."""
    return (predicted.float() - target).square().mean(dim=(1, 2, 3))
