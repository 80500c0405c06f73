"""The engine equals plain diffusers, row by row, whatever else is in the batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from momalisa.config import Diffusion
from momalisa.engine import Done, Engine, GenerationError, Request

REQUEST = Request("a red boat on a blue sea", seed=7, steps=4, guidance_scale=5.0, size_px=64)


@pytest.fixture(scope="module")
def diffusion(tiny_base: Path) -> Diffusion:
    return Diffusion(model=str(tiny_base))


@pytest.fixture(scope="module")
def engine(diffusion: Diffusion) -> Engine:
    return Engine.load(diffusion)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def by_diffusers(diffusion: Diffusion, request: Request) -> Image.Image:
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion.model, safety_checker=None, dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        width=request.size_px,
        height=request.size_px,
        generator=torch.Generator().manual_seed(request.seed),
    )
    picture = result.images[0]
    assert isinstance(picture, Image.Image)
    return picture


def test_a_mixed_batch_equals_plain_diffusers_request_by_request(diffusion: Diffusion, engine: Engine) -> None:
    requests = [
        REQUEST,
        replace(REQUEST, prompt="a tree in winter under a red sky", seed=8, guidance_scale=1.0),
        replace(REQUEST, seed=9, negative_prompt="green", guidance_scale=2.0),
        replace(REQUEST, steps=3),
        replace(REQUEST, size_px=128),
    ]
    pictures = engine.generate(requests)
    assert [picture.size for picture in pictures] == [(64, 64)] * 4 + [(128, 128)]
    for request, picture in zip(requests, pictures, strict=True):
        assert difference(picture, by_diffusers(diffusion, request)) <= 1, request


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(engine: Engine) -> None:
    first, again = engine.generate([REQUEST])[0], engine.generate([REQUEST])[0]
    assert difference(first, again) == 0
    assert difference(first, engine.generate([replace(REQUEST, seed=8)])[0]) > 1


def test_scale_one_costs_one_row_a_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = engine.unet.forward
    monkeypatch.setattr(engine.unet, "forward", lambda sample, *a, **k: (rows.append(len(sample)), forward(sample, *a, **k))[1])
    engine.generate([replace(REQUEST, steps=1, guidance_scale=1.0), replace(REQUEST, steps=1)])
    assert rows == [3]


def test_on_step_counts_picture_steps_after_every_tick(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    engine.generate([replace(REQUEST, steps=2), replace(REQUEST, steps=1)], lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]


def test_bf16_draws_nearly_the_same_picture(diffusion: Diffusion, engine: Engine) -> None:
    plain = np.asarray(engine.generate([REQUEST])[0], np.int16)
    half = np.asarray(Engine.load(diffusion, dtype=torch.bfloat16).generate([REQUEST])[0], np.int16)
    assert np.abs(plain - half).mean() < 8


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_few_and_many_steps(engine: Engine, steps: int) -> None:
    assert engine.generate([replace(REQUEST, steps=steps, guidance_scale=1.0)])[0].size == (64, 64)


def test_nothing_asked_nothing_made(engine: Engine) -> None:
    assert engine.generate([]) == []


def test_nan_is_an_error_and_never_a_black_picture(diffusion: Diffusion) -> None:
    broken = Engine.load(diffusion)
    with torch.no_grad():
        next(broken.unet.parameters()).fill_(math.nan)
    with pytest.raises(GenerationError, match=r"the UNet produced NaN or infinity \(seed 7\)"):
        broken.generate([REQUEST])


def test_a_folder_without_a_scheduler_is_named(tmp_path: Path) -> None:
    from momalisa.engine import scheduler_config

    with pytest.raises(ValueError, match=r"cannot load .* \(scheduler\)"):
        scheduler_config(Diffusion(model=str(tmp_path)))


def test_many_reproducible_requests_do_not_starve_the_others(diffusion: Diffusion) -> None:
    engine = Engine.load(diffusion, max_rows=8)
    alone = [engine.submit(replace(REQUEST, steps=6, seed=seed, reproducible=True)) for seed in range(5)]
    common = engine.submit(replace(REQUEST, steps=6))
    small = engine.submit(replace(REQUEST, steps=6, size_px=32))
    ended: list[int] = []
    for _ in range(3 * 6):
        ended += [event.id for event in engine.tick() if isinstance(event, Done)]
    assert {common, small} <= set(ended)  # a third of the ticks each
    while not engine.idle:
        ended += [event.id for event in engine.tick() if isinstance(event, Done)]
    assert [id_ for id_ in ended if id_ in alone] == alone  # they take turns among themselves
