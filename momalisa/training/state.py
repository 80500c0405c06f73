"""A trainer's state as safetensors and JSON: weights, EMA, optimizer moments, progress. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from momalisa.training import optimizer as optimizers
from momalisa.training.ema import Average, Ema

TENSORS = "trainer.safetensors"
PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a run has come, and its history."""

    images_seen: int = 0
    step: int = 0
    ema_updates: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (images seen, mean loss since the last entry)
    workers: list[tuple[int, int]] = field(default_factory=list)  # (images seen, workers from there on)
    stopped: bool = False  # early, because more training was not worth it
    scaler: dict[str, float] | None = None  # in fp16: the loss's scale, and how long it has stood


def tensors(
    parameters: dict[str, torch.nn.Parameter],
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    powers: Mapping[float, Average] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """Copies on the CPU of all that training resumes from. Parameters are named; the optimizer's state follows them.

    `powers`: further averages by their length.
    """
    found: dict[str, torch.Tensor] = {f"model/{name}": value for name, value in parameters.items()}
    found |= {f"ema/{name}": value for name, value in ema.shadow.items()}
    found |= {f"ema-{sigma}/{name}": value for sigma, one in powers.items() for name, value in one.shadow.items()}
    found |= {f"optimizer/{place}": value for place, value in optimizers.state(optimizer, parameters).items()}
    return {name: value.detach().contiguous().to("cpu", copy=True) for name, value in found.items()}


def write(directory: Path, found: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
    """Both files, into a directory of their own."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(found, directory / TENSORS)
    (directory / PROGRESS).write_text(json.dumps(progress))


@torch.no_grad()
def restore(
    directory: Path,
    parameters: dict[str, torch.nn.Parameter],
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    powers: Mapping[float, Average] = MappingProxyType({}),
) -> Progress:
    """Put a saved state back. Raises ValueError where it belongs to another model."""
    found = load_file(directory / TENSORS)
    saved = {name.removeprefix("model/") for name in found if name.startswith("model/")}
    if saved != set(parameters):
        raise ValueError(f"{directory} holds the state of another model ({len(saved)} parameters, expected {len(parameters)})")
    for name, value in parameters.items():
        value.copy_(found[f"model/{name}"])
        ema.shadow[name].copy_(found[f"ema/{name}"])
        for sigma, one in powers.items():
            one.shadow[name].copy_(found[f"ema-{sigma}/{name}"])
    moments = {name.removeprefix("optimizer/"): value for name, value in found.items() if name.startswith("optimizer/")}
    optimizers.restore(optimizer, parameters, moments)
    progress = Progress(**json.loads((directory / PROGRESS).read_text()))
    progress.workers = [(int(images), int(workers)) for images, workers in progress.workers]
    progress.losses = [(int(images), float(loss)) for images, loss in progress.losses]
    ema.updates = progress.ema_updates
    return progress
