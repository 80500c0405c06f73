"""Requests -> pictures: the one place where noise is turned into art.

Requests of equal steps and size share a batch; each brings its own noise, guidance scale and prompts. What one
request gets does not depend on its neighbours but for the last bits of float sums. The server, the evaluation
pictures of training, and promotion all draw through here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from momalisa.config import Diffusion
from momalisa.latents import Autoencoder, TextEncoder, to_pictures
from momalisa.weights import locate

OnStep = Callable[[int, int], None]


class GenerationError(ArithmeticError):
    """The model computed something that is no picture (NaN or infinity)."""


@dataclass(frozen=True)
class Request:
    """One picture to make. The same request gives the same picture."""

    prompt: str
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 7.5  # 1: no guidance, half the work; the negative prompt then means nothing
    negative_prompt: str = ""
    size_px: int = 512  # a square of this side


class Engine:
    """A UNet with its autoencoder, text encoder and noise schedule, sampled by DPM++ 2M (Lu et al. 2022)."""

    def __init__(
        self,
        unet: Any,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        scheduler_config: dict[str, Any],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`unet` is moved to `device` but keeps its type and mode: `dtype` other than float32 is autocast's."""
        self.device = torch.device(device)
        self.dtype = dtype
        self.unet = unet.to(self.device)
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.scheduler_config = scheduler_config

    @classmethod
    def load(
        cls, diffusion: Diffusion, unet: Any = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Engine:
        """The base's pipeline around `unet` (default: the base's own). Raises ValueError where the base cannot be loaded."""
        from momalisa.checkpoint import load_base_unet

        autoencoder = Autoencoder.load(diffusion, device, dtype)
        text_encoder = TextEncoder.load(diffusion, device, dtype)
        return cls(
            load_base_unet(diffusion) if unet is None else unet,
            autoencoder,
            text_encoder,
            scheduler_config(diffusion),
            device,
            dtype,
        )

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], on_step: OnStep | None = None) -> list[Image.Image]:
        """RGB pictures in the order of the requests. `on_step(done, total)` is called after every sampler step.

        The caller bounds the number of requests: all of equal (steps, size) are in memory together.
        Raises ValueError for a request that cannot be, GenerationError where the result is not finite.
        """
        for request in requests:
            self._check(request)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault((request.steps, request.size_px), []).append(index)
        progress = _Progress(sum(steps for steps, _ in groups), on_step)
        pictures: dict[int, Image.Image] = {}
        for members in groups.values():
            latents = self._denoise([requests[index] for index in members], progress)
            pixels = self.autoencoder.decode(latents)
            _require_finite(pixels, "the autoencoder", [requests[index] for index in members])
            pictures.update(zip(members, to_pictures(pixels), strict=True))
        return [pictures[index] for index in range(len(requests))]

    def _check(self, request: Request) -> None:
        factor = self.autoencoder.factor
        if request.steps < 1:
            raise ValueError(f"steps={request.steps} must be at least 1; 20 is a good number")
        if request.size_px < factor or request.size_px % factor:
            raise ValueError(
                f"size_px={request.size_px} is not a multiple of {factor}; try {max(1, round(request.size_px / factor)) * factor}"
            )
        if not request.guidance_scale >= 1:
            raise ValueError(f"guidance_scale={request.guidance_scale} must be at least 1, which is no guidance; try 7.5")

    def _denoise(self, requests: Sequence[Request], progress: _Progress) -> Tensor:
        """Requests of equal steps and size -> scaled latents [B, C, h, w] float32 on the device."""
        guided = [row for row, request in enumerate(requests) if request.guidance_scale > 1]
        texts = [request.prompt for request in requests] + [requests[row].negative_prompt for row in guided]
        states = self._embed(texts)  # [B + G, L, D]
        scale = torch.tensor([requests[row].guidance_scale for row in guided], device=self.device).view(-1, 1, 1, 1)
        scheduler = self._scheduler(requests[0].steps)
        latents: Tensor = self._noise(requests) * scheduler.init_noise_sigma
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            for timestep in scheduler.timesteps:
                rows = scheduler.scale_model_input(torch.cat([latents, latents[guided]]), timestep)
                output = self.unet(rows, timestep, encoder_hidden_states=states, return_dict=False)[0].float()
                prediction, unconditional = output.split([len(requests), len(guided)])
                if guided:  # Ho & Salimans 2022: e = e_uncond + s (e_cond - e_uncond), for the rows that ask for it
                    prediction = prediction.clone()
                    prediction[guided] = unconditional + scale * (prediction[guided] - unconditional)
                latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
                progress.step()
        _require_finite(latents, "the UNet", requests)
        return latents

    def _noise(self, requests: Sequence[Request]) -> Tensor:
        """[B, C, h, w] float32: each row from its own seed on the CPU, whatever the device and the neighbours."""
        side = requests[0].size_px // self.autoencoder.factor
        shape = (1, self.autoencoder.channels, side, side)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(request.seed)) for request in requests]
        return torch.cat(rows).to(self.device)

    def _embed(self, texts: list[str]) -> Tensor:
        """Texts -> [B, L, D] float32; a text that occurs twice is encoded once."""
        distinct = list(dict.fromkeys(texts))
        states: Tensor = self.text_encoder.embed(self.text_encoder.tokenize(distinct)).to(self.device, torch.float32)
        return states.index_select(0, torch.tensor([distinct.index(text) for text in texts], device=self.device))

    def _scheduler(self, steps: int) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        kind: Any = DPMSolverMultistepScheduler
        scheduler = kind.from_config(self.scheduler_config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler


def scheduler_config(diffusion: Diffusion) -> dict[str, Any]:
    """The base model's published noise schedule. Raises ValueError where it cannot be loaded."""
    from diffusers import DPMSolverMultistepScheduler

    where = locate(diffusion.model)
    try:
        return dict(DPMSolverMultistepScheduler.load_config(where, subfolder="scheduler", revision=diffusion.revision))
    except OSError as error:
        raise ValueError(f"cannot load {diffusion.model} (scheduler): {' '.join(str(error).split())}") from error


class _Progress:
    """Counts sampler steps over all groups of one call."""

    def __init__(self, total: int, on_step: OnStep | None) -> None:
        self.done, self.total, self.on_step = 0, total, on_step

    def step(self) -> None:
        self.done += 1
        if self.on_step is not None:
            self.on_step(self.done, self.total)


def _require_finite(values: Tensor, part: str, requests: Sequence[Request]) -> None:
    """Raises GenerationError naming the seeds of the rows that hold NaN or infinity."""
    finite = torch.isfinite(values).flatten(1).all(1).tolist()
    if not all(finite):
        seeds = ", ".join(str(request.seed) for request, good in zip(requests, finite, strict=True) if not good)
        raise GenerationError(f"{part} produced NaN or infinity (seeds {seeds}): the weights are damaged, or try precision fp32")
