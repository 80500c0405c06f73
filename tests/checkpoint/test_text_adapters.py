"""Adapters on the text encoder are part of a checkpoint: whoever loads it draws as diffusers does with the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint
from momalisa.checkpoint.export import export
from momalisa.config import Diffusion
from momalisa.engine import Engine, Request
from momalisa.engine.samplers import KINDS
from momalisa.latents import TextEncoder
from momalisa.storage import Store
from momalisa.training.loop import Events, Trainer
from tests.engine.conftest import difference
from tests.training.test_options import run_of

REQUEST = Request("a red boat", seed=3, steps=4, guidance_scale=4.0, size_px=64)
Published = tuple[Store, Checkpoint]


def published(base: Path, place: Path, **options: Any) -> Published:
    """What training writes of adapters on both, the text encoder's so large that they show."""
    run = run_of(base, place, lora_rank=2, images=8, lora_text_encoder=True, **options)
    trainer = Trainer(run, Events())
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in trainer.trained.items():
            if name.startswith(checkpoints.TEXT_PREFIX) and "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=source))
    trainer.train()
    return run.store, checkpoints.read_all(run.store, run.name)[-1]


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return published(tiny_base, tmp_path_factory.mktemp("plain"), lora_alpha=4.0)


def by_diffusers(pipeline: Any) -> Image.Image:
    name, options = KINDS[REQUEST.sampler]
    assert name == "DPMSolverMultistepScheduler"
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)
    picture: Image.Image = pipeline(
        REQUEST.prompt,
        num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.guidance_scale,
        generator=torch.Generator().manual_seed(REQUEST.seed),
        width=64,
        height=64,
    ).images[0]
    return picture


def with_adapters(base: Path, found: Published) -> Image.Image:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
    folder = Path(found[0].root) / found[1].path / "weights"
    pipeline.load_lora_weights(folder, weight_name=checkpoints.LORA_FILE)
    return by_diffusers(pipeline)


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 6.0}, {"dora": True}], ids=str)
def test_a_checkpoint_draws_with_its_own_text_encoder(tiny_base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    store, found = published(tiny_base, tmp_path, **options)
    unet, text_encoder = checkpoints.load_unet(store, found), checkpoints.load_text_encoder(store, found)
    ours = Engine.load(found.diffusion, unet, text_encoder=text_encoder).generate([REQUEST])[0]
    assert difference(ours, with_adapters(tiny_base, (store, found))) <= 1
    assert difference(ours, Engine.load(found.diffusion, unet).generate([REQUEST])[0]) > 1
    assert not any("lora" in name for name, _ in text_encoder.model.named_parameters())


def test_an_adapter_a_request_brings_its_texts(tiny_base: Path, plain: Published) -> None:
    store, found = plain
    engine = Engine.load(found.diffusion, store=store)
    before = {name: value.clone() for name, value in engine.text_encoder.model.state_dict().items()}
    asked = replace(REQUEST, adapter=found.path.removeprefix("checkpoints/"))
    first, own, again = engine.generate([REQUEST, asked, REQUEST])
    expected = Engine.load(found.diffusion).generate([REQUEST])[0]
    assert difference(own, with_adapters(tiny_base, plain)) <= 1
    assert difference(first, expected) <= 1
    assert difference(again, expected) <= 1
    after = engine.text_encoder.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    weights = {value.data_ptr() for value in engine.text_encoder.model.parameters()}
    assert engine._adapters is not None
    (loaded,) = [future.result() for future in engine._adapters._loaded.values()]
    assert loaded.text_encoder is not None
    assert all("lora_" in name or value.data_ptr() in weights for name, value in loaded.text_encoder.model.named_parameters())
    engine.close()


def test_an_exported_pipeline_has_the_text_encoder_too(plain: Published, tiny_base: Path, tmp_path: Path) -> None:
    folder = export(*plain, tmp_path / "fused", fuse=True)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    assert difference(by_diffusers(pipeline), with_adapters(tiny_base, plain)) <= 1
    assert "LoRA adapters for the UNet and the text encoder" in (folder / "README.md").read_text()


def test_other_checkpoints_have_the_base_s(tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(tiny_base, tmp_path, lora_rank=2, images=8)
    Trainer(run, Events()).train()
    (found,) = checkpoints.read_all(run.store, run.name)
    loaded, base = checkpoints.load_text_encoder(run.store, found), TextEncoder.load(Diffusion(model=str(tiny_base)))
    ids = base.tokenize(["a boat"])
    assert torch.equal(loaded.embed(ids), base.embed(ids))
    assert checkpoints.load_text_encoder(run.store, found, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_file_that_was_changed_is_never_loaded(tiny_base: Path, tmp_path: Path) -> None:
    store, found = published(tiny_base, tmp_path)
    store.write_bytes(f"{found.path}/weights/{checkpoints.LORA_FILE}", b"not what it was")
    with pytest.raises(ValueError, match=checkpoints.LORA_FILE):
        checkpoints.load_text_encoder(store, found)
