"""A tiny museum with latents, pictures and checkpoints, and evidence made up where only the rules are tested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from momalisa import checkpoint as checkpoints
from momalisa import config
from momalisa.checkpoint import Checkpoint
from momalisa.collect.phash import look
from momalisa.config import Settings
from momalisa.dataset import Dataset
from momalisa.promotion.decision import Evidence
from momalisa.promotion.measure import png
from momalisa.records import IMAGES, LATENTS, Artwork
from momalisa.storage import Store
from momalisa.training import split
from momalisa.training.run import Plan

SD14 = {"model": "CompVis/stable-diffusion-v1-4", "revision": None, "variant": None}


def made(images_seen: int, digest: str = "0" * 64) -> Checkpoint:
    path = f"checkpoints/run/{images_seen:09d}"
    return Checkpoint(path, "run", images_seen, SD14, {"unet.safetensors": digest})


def evidence(images_seen: int | None, loss: float, **more: Any) -> Evidence:
    """Of a checkpoint (None: of the base), with losses that vary from work to work."""
    spread = np.linspace(-0.1, 0.1, 41)
    return Evidence(made(images_seen) if images_seen else None, loss + spread, **more)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def written(store: Store, tmp_path: Path) -> Callable[[int], Checkpoint]:
    """Writes a checkpoint of a few bytes."""

    def write(images_seen: int) -> Checkpoint:
        folder = tmp_path / f"weights-{images_seen}"
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"seen": {images_seen}}}')
        entry = Checkpoint(f"checkpoints/run/{images_seen:09d}", "run", images_seen, SD14, {})
        return checkpoints.write(store, entry, folder)

    return write


Museum = tuple[Settings, Plan]


@pytest.fixture
def museum(tiny_base: Path, tmp_path: Path) -> Museum:
    """Twenty works with pictures and latents, and two checkpoints: at 10 images a better one, at 20 a worse one."""
    settings = Settings(
        root=str(tmp_path / "museum"),
        diffusion=config.Diffusion(model=str(tiny_base)),
        encode=config.Encode(resolution_px=32),
        train=config.Train(held_out_fraction=0.4, images=20),
        promote=config.Promote(
            timesteps=2,
            max_pictures=5,
            distance_pictures=0,
            distance_steps=1,
            batch=4,
            guidance_scale=1.0,
            general_pictures=3,
            general_tolerance=9.0,
            gate_pictures=4,
        ),
        wandb=config.Wandb(mode="disabled"),
    )
    dataset, source = Dataset(settings.dataset), torch.Generator().manual_seed(0)
    names = [f"work-{i}" for i in range(20)]
    works, latents = [], []
    for number, name in enumerate(names):
        picture = Image.new("RGB", (32, 32), (12 * number, 0, 0))
        phash, thumbnail = look(picture)
        works.append(Artwork(id=name, bytes=png(picture), width=32, height=32, phash=phash, thumbnail=thumbnail).row())
        moments = torch.randn((8, 4, 4), generator=source).half().numpy().tobytes()
        caption = f"A MOMA artwork of: {name}"
        shape = {"channels": 4, "height": 4, "width": 4, "status": "ok", "error": "", "token_ids": [5] * 77}
        latents.append({"id": name, "moments": moments, "caption": caption, **shape})
    encoder = "e"
    tables = [dataset.put_rows(f"latents/{encoder}", latents, LATENTS)]
    images = [dataset.put_rows("images", works, IMAGES)]
    dataset.publish(dataset.latest().with_images(images).with_latents(encoder, tables))
    for images_seen, scale in ((10, 0.0), (20, 30.0)):
        unet = checkpoints.load_base_unet(settings.diffusion)
        for value in unet.conv_out.parameters():
            value.data.mul_(scale)
        folder = tmp_path / f"unet-{images_seen}"
        checkpoints.save_weights(unet, folder, lora=False)
        entry = Checkpoint(f"checkpoints/run/{images_seen:09d}", "run", images_seen, settings.diffusion.model_dump(), {})
        checkpoints.write(Store(settings.root), entry, folder)
    held_out = split.held_out(split.by_work(names), settings.train.held_out_fraction)
    return settings, Plan("run", encoder, tuple(tables), held_out=held_out, works=len(names))
