"""A generator in this process: the miniature's architecture with random weights, published and promoted in a store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import torch

from momalisa import checkpoint, config
from momalisa.config import Diffusion, Settings
from momalisa.miniature import models
from momalisa.storage import Store
from serve.api import create_app
from serve.replica import Generator

LIMITS = config.Serve(size_px=64, steps=1, guidance_scale=1.0, max_pictures_per_request=3, max_prompt_chars=200, max_waiting=4)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base, weights, root = (tmp_path_factory.mktemp(name) for name in ("base", "weights", "root"))
    tokenizer = models.build_clip_tokenizer()
    text_encoder = models.text_encoder_of(models.build_clip(tokenizer))
    models.save_diffusion(base, models.build_vae(), models.build_unet(), text_encoder, tokenizer)
    diffusion = Diffusion(model=str(base))
    store = Store(str(root))
    checkpoint.save_weights(checkpoint.load_base_unet(diffusion), weights, lora=False)
    entry = checkpoint.Checkpoint("checkpoints/tiny/64", "tiny", 64, diffusion.model_dump(), files={})
    checkpoint.write(store, entry, weights)
    store.write_json(checkpoint.BEST, {"checkpoint": entry.path})
    return Settings.model_construct(**{**dict(Settings()), "root": str(root), "diffusion": diffusion, "serve": LIMITS})


@pytest.fixture(scope="session")
def generator(settings: Settings) -> Iterator[Generator]:
    made = Generator(settings, "checkpoints/tiny/64")
    yield made
    made.close()


@pytest.fixture
async def client(generator: Generator) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(generator, LIMITS))
    async with httpx.AsyncClient(transport=transport, base_url="http://museum") as made:
        yield made
