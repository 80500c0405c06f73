"""What the base model knew before: 200 captions of everything, drawn by the base itself.

A fine-tune that forgets predicts the noise of these pictures worse than the base does. They are drawn once, encoded, and
kept below the root under a hash of the base and of every setting that shapes them:

    <root>/general/<hash>/latents.safetensors
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from momalisa.config import Settings
from momalisa.engine import Engine, Request
from momalisa.latents import Autoencoder, load_tokenizer, to_pixels, tokenize
from momalisa.storage import Store
from momalisa.training.cache import LatentCache
from momalisa.weights import identity, short_id

SEED = 30_000


def captions(count: int) -> list[str]:
    """The first `count` of the captions, spread over all kinds. Raises ValueError for more than there are."""
    found = files("momalisa.promotion").joinpath("general.txt").read_text(encoding="utf-8").splitlines()
    if count > len(found):
        raise ValueError(f"promote.general_pictures={count} is more than the {len(found)} captions there are")
    step = 7  # prime to the number of lines: neighbours are of one kind
    return [found[index * step % len(found)] for index in range(count)]


def path(settings: Settings) -> str:
    """Where this base's pictures of the captions are kept."""
    chosen, base = settings.promote, settings.diffusion
    shape = settings.encode.resolution_px, chosen.distance_steps, chosen.guidance_scale, SEED
    name = short_id("general", identity(base.model, base.revision), base.variant, shape, captions(chosen.general_pictures))
    return f"general/{name}/latents.safetensors"


def draw(settings: Settings, device: torch.device) -> None:
    """Draw and encode them, unless they are there."""
    store, chosen = Store(settings.root), settings.promote
    if store.exists(path(settings)):
        return
    engine, autoencoder = Engine.load(settings.diffusion, None, device), Autoencoder.load(settings.diffusion, device)
    options: dict[str, Any] = {
        "steps": chosen.distance_steps,
        "guidance_scale": chosen.guidance_scale,
        "size_px": settings.encode.resolution_px,
    }
    requests = [Request(prompt=text, seed=SEED + i, **options) for i, text in enumerate(captions(chosen.general_pictures))]
    moments = []
    for start in range(0, len(requests), chosen.batch):
        pictures = engine.generate(requests[start : start + chosen.batch])
        moments.append(autoencoder.encode(torch.stack([to_pixels(picture, picture.width) for picture in pictures])))
    store.write_bytes(path(settings), save_tensors({"moments": torch.cat(moments).contiguous()}))


def load(settings: Settings) -> LatentCache:
    """Captions, moments and token ids, for `quality.held_out_losses`."""
    texts = captions(settings.promote.general_pictures)
    moments = load_tensors(Store(settings.root).read_bytes(path(settings)))["moments"]
    return LatentCache(texts, texts, list(moments), tokenize(load_tokenizer(settings.diffusion), texts))
