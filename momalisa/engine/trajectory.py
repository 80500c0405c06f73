"""One picture on its way from noise: where it is, and what it started from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from momalisa.engine.request import Request
from momalisa.engine.samplers import Table
from momalisa.latents import Autoencoder, from_bytes, sample


@dataclass(frozen=True)
class Known:
    """What an inpainting keeps: float32 [C, h, w] scaled latents of the image, their noise, and [1, h, w] 1 = repaint."""

    image: Tensor
    noise: Tensor
    mask: Tensor


@dataclass(eq=False)
class Trajectory:
    """A request in flight; `done` counts its sampler steps."""

    id: int
    request: Request
    table: Table
    done: int = 0
    known: Known | None = None

    @property
    def steps(self) -> int:
        return len(self.table)

    @cached_property
    def _guided(self) -> list[bool]:
        """For each step, whether it needs an unconditional row too."""
        low, high = self.request.guidance_interval
        return [self.request.guidance_scale > 1 and low <= sigma <= high for sigma in self.table.sigmas.tolist()]

    @property
    def guided(self) -> bool:
        """Whether the next step needs an unconditional row too."""
        return self.done < self.steps and self._guided[self.done]

    @property
    def most_rows(self) -> int:
        return 2 if self.request.guidance_scale > 1 else 1

    @property
    def row_steps(self) -> int:
        """Rows times steps that are still to do."""
        return self.steps - self.done + sum(self._guided[self.done :])

    @property
    def preview_due(self) -> bool:
        """Previews lie evenly between the first step and the last, which is the picture itself."""
        wanted = self.request.previews
        return 0 < self.done < self.steps and any(
            self.done == max(1, self.steps * number // (wanted + 1)) for number in range(1, wanted + 1)
        )

    def start(self, autoencoder: Autoencoder, device: torch.device) -> Tensor:
        """The first latents [C, h, w] float32. Random numbers are drawn on the CPU in the order of diffusers' pipelines."""
        request, source = self.request, torch.Generator().manual_seed(self.request.seed)
        side = request.size_px // autoencoder.factor
        shape = (autoencoder.channels, side, side)
        if request.image is None:
            return (torch.randn(shape, generator=source) * self.table.noise_scale).to(device)
        moments = autoencoder.moments(pixels_of(request.image).to(device))[0]
        drawn = torch.randn(shape, generator=source).to(device)
        image = sample(moments, drawn, autoencoder.scaling_factor)
        noise = torch.randn(shape, generator=source).to(device)
        if request.mask is not None:
            self.known = Known(image, noise, mask_of(request.mask, autoencoder.factor).to(device))
            if request.strength == 1:  # as diffusers: inpainting starts from noise alone
                return noise * self.table.noise_scale
        return self.known_latents(0, image, noise)

    def known_latents(self, step: int, image: Tensor, noise: Tensor) -> Tensor:
        """The image's latents as noisy as they are before a step."""
        signal, level = self.table.known[step].tolist()
        latents: Tensor = image * signal + noise * level
        return latents


def pixels_of(picture: Image.Image) -> Tensor:
    """RGB -> [1, 3, H, W] float32 in -1..1."""
    return from_bytes(_bytes(picture)[None])


def mask_of(picture: Image.Image, factor: int) -> Tensor:
    """L -> [1, h, w] float32, 0 or 1: one pixel stands for each latent place, as in diffusers' pipeline."""
    white = (_bytes(picture) / 255 >= 0.5).float()
    places: Tensor = torch.nn.functional.interpolate(white[None, None], scale_factor=1 / factor)
    return places[0]


def _bytes(picture: Image.Image) -> Tensor:
    shape = (picture.height, picture.width, *([3] if picture.mode == "RGB" else []))
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(shape)
