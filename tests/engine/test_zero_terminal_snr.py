"""A model that was trained on a schedule that ends in noise alone is drawn on that schedule, as diffusers does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint.export import export
from momalisa.config import Diffusion
from momalisa.diffusion import Schedule
from momalisa.engine import SAMPLERS, Engine, Request
from momalisa.engine.samplers import KINDS
from momalisa.training.loop import Events, Trainer
from tests.engine.conftest import difference, photograph
from tests.training.test_options import run_of

REQUEST = Request("a red boat", seed=3, steps=4, guidance_scale=4.0, size_px=64)


def by_diffusers(base: Path, request: Request, rescaled: bool = True, **parts: Any) -> Image.Image:
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32, **parts)
    given: dict[str, Any] = {"width": request.size_px, "height": request.size_px}
    if request.image is not None:
        components = {**pipeline.components, "safety_checker": None, "feature_extractor": None}
        pipeline = diffusers.StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
        given = {"image": request.image, "strength": request.strength}
    name, options = KINDS[request.sampler]
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if rescaled else {}
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options, **schedule)
    pipeline.set_progress_bar_config(disable=True)
    picture: Image.Image = pipeline(
        request.prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **given,
    ).images[0]
    return picture


def test_every_sampler_equals_diffusers_on_the_schedule_of_training(v_base: Path) -> None:
    diffusion = Diffusion(model=str(v_base))
    engine = Engine.load(diffusion, zero_terminal_snr=True)
    asked = [replace(REQUEST, sampler=sampler) for sampler in SAMPLERS]
    asked.append(replace(REQUEST, image=photograph(1), strength=0.5))
    for request, picture in zip(asked, engine.generate(asked), strict=True):
        assert difference(picture, by_diffusers(v_base, request)) <= 1, request.sampler
    assert difference(engine.generate([REQUEST])[0], by_diffusers(v_base, REQUEST, rescaled=False)) > 1
    first = engine._samplers.scheduler("ddim")
    first.set_timesteps(4)
    assert int(first.timesteps[0]) == 999
    assert first.alphas_cumprod[999] == Schedule.load(diffusion, zero_terminal_snr=True).alphas_cumprod[-1] == 0


def test_a_checkpoint_says_how_it_was_trained(v_base: Path, tmp_path: Path) -> None:
    run = run_of(v_base, tmp_path, zero_terminal_snr=True, min_snr_gamma=None, images=8)
    Trainer(run, Events()).train()
    (found,) = checkpoints.read_all(run.store, run.name)
    assert found.zero_terminal_snr
    unet = checkpoints.load_unet(run.store, found)
    expected = by_diffusers(v_base, replace(REQUEST, sampler="ddim"), unet=unet)
    folder = export(run.store, found, tmp_path / "out")
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        REQUEST.prompt,
        num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.guidance_scale,
        generator=torch.Generator().manual_seed(REQUEST.seed),
        width=64,
        height=64,
    ).images[0]
    assert difference(picture, expected) <= 1
    assert "| noise schedule | with zero terminal SNR |" in (folder / "README.md").read_text()


def test_adapters_bring_their_schedule_with_them(v_base: Path, tmp_path: Path) -> None:
    run = run_of(v_base, tmp_path, zero_terminal_snr=True, min_snr_gamma=None, images=8, lora_rank=2)
    Trainer(run, Events()).train()
    (found,) = checkpoints.read_all(run.store, run.name)
    engine = Engine.load(found.diffusion, store=run.store)
    asked = replace(REQUEST, adapter=found.path.removeprefix("checkpoints/"))
    plain, own = engine.generate([REQUEST, asked])
    assert difference(plain, by_diffusers(v_base, REQUEST, rescaled=False)) <= 1
    assert difference(own, by_diffusers(v_base, REQUEST, unet=checkpoints.load_unet(run.store, found))) <= 1
    engine.close()


@pytest.mark.parametrize("training", [{}, {"settings": None}, {"settings": {"seed": 0}}])
def test_other_checkpoints_keep_the_base_s_schedule(training: dict[str, Any]) -> None:
    assert not checkpoints.Checkpoint("checkpoints/a/1", "a", 1, {}, {}, training=training).zero_terminal_snr
