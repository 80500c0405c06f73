"""A trainer's state as safetensors and JSON: weights, EMA, optimizer moments, progress. No pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from momalisa.training.ema import Ema

TENSORS = "trainer.safetensors"
PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a run has come, and its history."""

    images_seen: int = 0
    step: int = 0
    ema_updates: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (images seen, mean loss since the last entry)


def save(
    directory: Path, parameters: dict[str, torch.nn.Parameter], ema: Ema, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write both files into a directory. Parameters are named; the optimizer's state follows their names."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model/{name}": value.detach().contiguous() for name, value in parameters.items()}
    tensors |= {f"ema/{name}": value.contiguous() for name, value in ema.shadow.items()}
    for name, value in parameters.items():
        for key, moment in optimizer.state[value].items():
            tensors[f"optimizer/{key}/{name}"] = moment.detach().contiguous()
    save_file(tensors, directory / TENSORS)
    (directory / PROGRESS).write_text(json.dumps(asdict(progress)))


@torch.no_grad()
def restore(directory: Path, parameters: dict[str, torch.nn.Parameter], ema: Ema, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a saved state back. Raises ValueError where it belongs to another model."""
    tensors = load_file(directory / TENSORS)
    saved = {name.removeprefix("model/") for name in tensors if name.startswith("model/")}
    if saved != set(parameters):
        raise ValueError(f"{directory} holds the state of another model ({len(saved)} parameters, expected {len(parameters)})")
    for name, value in parameters.items():
        value.copy_(tensors[f"model/{name}"])
        ema.shadow[name].copy_(tensors[f"ema/{name}"])
        moments = {key: tensors[f"optimizer/{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[value] = {
            key: moment if key == "step" and not _fused(optimizer) else moment.to(value.device) for key, moment in moments.items()
        }
    progress = Progress(**json.loads((directory / PROGRESS).read_text()))
    progress.losses = [(int(images), float(loss)) for images, loss in progress.losses]
    ema.updates = progress.ema_updates
    return progress


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))
