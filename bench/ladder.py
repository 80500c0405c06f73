"""The optimisations of our training step in the order in which bench/train.py --ladder switches them on, and how each is
switched off in a process that trains.

Without any of them a step does what diffusers' train_text_to_image.py does by default: it encodes pixels with the VAE and token
ids with the text encoder, computes in fp32, and goes through AdamW and the average of the weights as PyTorch and diffusers do
when nothing else is asked for. (Pictures are decoded beforehand; the script decodes them in its loader.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from momalisa import attention
from momalisa.config import Train
from momalisa.latents import Autoencoder, from_bytes
from momalisa.training import batches, loop
from momalisa.training import optimizer as optimizers
from momalisa.training.cache import LatentCache
from momalisa.training.ema import Average

MOMENTS = "cached moments"


@dataclass(frozen=True)
class Rung:
    """One optimisation: whether these options have it, and what takes it away."""

    name: str
    there: Callable[[argparse.Namespace], bool] = lambda options: True
    switch_off: Callable[[], None] = lambda: None  # in the process that trains
    options: dict[str, Any] = field(default_factory=dict)  # of bench/train.py


@dataclass(frozen=True)
class Pictures(LatentCache):
    """Works that are encoded whenever they are used, a pass at a time. Their `moments` have a shape and nothing else."""

    pixels: Sequence[torch.Tensor]  # N of [H, W, 3] uint8
    autoencoder: Autoencoder

    def rows(self, indices: list[int]) -> Pictures:
        chosen = vars(super().rows(indices))
        return Pictures(**{**chosen, "pixels": [self.pixels[i] for i in indices], "autoencoder": self.autoencoder})

    def stacked(self) -> torch.Tensor:
        return self.autoencoder.encode(from_bytes(torch.stack(list(self.pixels))))


def pictures(paths: Sequence[Path], texts: list[str], token_ids: torch.Tensor, autoencoder: Autoencoder) -> Pictures:
    """The training set without moments; the pictures have one size."""
    pixels = [torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()) for path in paths]
    height, width = (side // autoencoder.factor for side in pixels[0].shape[:2])
    moments = torch.zeros((), dtype=torch.float16).expand(2 * autoencoder.channels, height, width)
    return Pictures([path.name for path in paths], texts, [moments] * len(pixels), token_ids, pixels, autoencoder)


def _texts_in_the_step() -> None:
    batches.MOST_EMBEDDINGS_BYTES = 0


def _plain_attention() -> None:
    attention.choose = lambda unet, device, dtype: None


def _plain_adamw() -> None:
    def build(settings: Train, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    optimizers.build = build


@torch.no_grad()
def _one_by_one(self: Average, decay: float) -> None:
    """As diffusers' EMAModel without `foreach`."""
    for name, value in self._parameters.items():
        shadow = self.shadow[name]
        shadow.sub_((1 - decay) * (shadow - value.detach().to(shadow.device, torch.float32)))


def _plain_average() -> None:
    Average.follow = _one_by_one  # type: ignore[method-assign]


def _contiguous() -> None:
    loop.layout = lambda device: torch.contiguous_format


def _batches_in_the_step() -> None:
    batches.Batches.at = batches.Batches.make  # type: ignore[method-assign]


def _on_gpu(options: argparse.Namespace) -> bool:
    return torch.cuda.is_available()


RUNGS = (
    Rung("cached text embeddings", switch_off=_texts_in_the_step),
    Rung(MOMENTS),
    Rung("bf16", lambda options: options.precision == "bf16", options={"precision": "fp32"}),
    Rung("attention as products", lambda options: not _on_gpu(options) and options.precision == "bf16", _plain_attention),
    Rung("fused AdamW", switch_off=_plain_adamw),
    Rung("foreach EMA", switch_off=_plain_average),
    Rung("channels_last", _on_gpu, _contiguous),
    Rung("batches made beside the step", _on_gpu, _batches_in_the_step),
    Rung("compile", lambda options: options.compile, options={"compile": False}),
    Rung("AdamW in 8 bits", lambda options: options.optimizer == "adamw8bit", options={"optimizer": "adamw"}),
)


def climb(options: argparse.Namespace) -> list[tuple[str, argparse.Namespace]]:
    """What each rung adds, and the options with it and all before it: first without any, last as `options` say."""
    there = [rung for rung in RUNGS if rung.there(options)]
    found = []
    for count in range(len(there) + 1):
        missing = there[count:]
        changed = {name: value for rung in missing for name, value in rung.options.items()}
        said = f"+ {there[count - 1].name}" if count else "nothing switched on"
        found.append((said, argparse.Namespace(**vars(options) | changed | {"off": [rung.name for rung in missing]})))
    return found


def switch_off(names: Sequence[str]) -> None:
    """In this process, before the trainer is made."""
    for rung in RUNGS:
        if rung.name in names:
            rung.switch_off()
