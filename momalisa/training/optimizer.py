"""The optimizers that there are, and their state by name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

from momalisa.config import Train


def build(settings: Train, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) in one kernel, or with its moments in 8 bits. Raises ValueError without bitsandbytes."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(f"train.optimizer=adamw8bit needs bitsandbytes ({error}): pip install 'momalisa[adam8bit]'") from error
    found: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **options)
    return found


def state(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """`<key>/<parameter>` -> tensor; a number becomes one."""
    return {
        f"{key}/{name}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], found: dict[str, torch.Tensor]) -> None:
    """Put back what `state` gave, moments in their parameter's strides, as kernels expect them that walk through memory."""
    for place, value in found.items():
        key, name = place.split("/", 1)
        parameter = parameters[name]
        number = key == "step" and not isinstance(optimizer, torch.optim.AdamW)
        optimizer.state[parameter][key] = int(value) if number else _beside(parameter, value)


def _beside(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """A copy on a parameter's device. Moments get its strides (channels_last beside a GPU): kernels that take a whole step go
    through both as they lie in memory."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
