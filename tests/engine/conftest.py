"""One small engine, and what diffusers' own pipelines make of a request."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from momalisa.config import Diffusion
from momalisa.engine import Engine, Request
from momalisa.engine.samplers import KINDS

Peer = Callable[[Request], Image.Image]


@pytest.fixture(scope="session")
def diffusion(tiny_base: Path) -> Diffusion:
    return Diffusion(model=str(tiny_base))


@pytest.fixture(scope="module")
def engine(diffusion: Diffusion) -> Engine:
    return Engine.load(diffusion, max_rows=8)


@pytest.fixture(scope="session")
def by_diffusers(diffusion: Diffusion) -> Peer:
    """A picture as the pipeline of its mode makes it, alone."""
    text_to_image: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        diffusion.model, safety_checker=None, dtype=torch.float32
    )
    parts = {**text_to_image.components, "safety_checker": None, "feature_extractor": None}
    config = text_to_image.scheduler.config

    @cache
    def pipeline(kind: str) -> Any:
        made = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    def make(request: Request) -> Image.Image:
        square = {"width": request.size_px, "height": request.size_px}
        given: dict[str, Any] = {"image": request.image, "strength": request.strength}
        if request.mask is not None:
            chosen, extra = pipeline("StableDiffusionInpaintPipeline"), {**given, **square, "mask_image": request.mask}
        elif request.image is not None:
            chosen, extra = pipeline("StableDiffusionImg2ImgPipeline"), given
        else:
            chosen, extra = pipeline("StableDiffusionPipeline"), square
        name, options = KINDS[request.sampler]
        chosen.scheduler = getattr(diffusers, name).from_config(config, **options)
        result = chosen(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            **extra,
        )
        picture: Image.Image = result.images[0]
        return picture

    return make


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of a channel, 0 to 255."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def photograph(seed: int, size_px: int = 64) -> Image.Image:
    """Smooth colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((size_px, size_px), Image.Resampling.BICUBIC)


def half_mask(size_px: int = 64) -> Image.Image:
    """White on the right."""
    mask = Image.new("L", (size_px, size_px), 0)
    mask.paste(255, (size_px // 2, 0, size_px, size_px))
    return mask
