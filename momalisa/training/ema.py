"""An exponential moving average of the trained weights, kept in fp32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class Ema:
    """decay = min(decay, (1 + n) / (10 + n)) after n updates: short at first, as in Stable Diffusion's own training."""

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = dict(parameters)
        self.shadow = {name: value.detach().clone().float() for name, value in self._parameters.items()}

    def to(self, device: torch.device) -> None:
        self.shadow = {name: value.to(device) for name, value in self.shadow.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        shadow = list(self.shadow.values())
        current = [value.detach().to(shadow[0].device, torch.float32) for value in self._parameters.values()]
        torch._foreach_lerp_(shadow, current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's parameters are the average; afterwards they are what they were."""
        saved = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._copy(self.shadow)
        try:
            yield
        finally:
            self._copy(saved)

    @torch.no_grad()
    def _copy(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in self._parameters.items():
            value.copy_(values[name])
