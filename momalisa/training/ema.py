"""Averages of the trained weights, kept in fp32: an exponential one, and power functions whose length is chosen afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from momalisa.training.profile import exponent


class Average:
    """Follows parameters, on a device of its own if need be."""

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        self._parameters = dict(parameters)
        self.shadow = {name: value.detach().clone().float() for name, value in self._parameters.items()}

    def to(self, device: torch.device) -> None:
        self.shadow = {name: value.to(device) for name, value in self.shadow.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """shadow = decay * shadow + (1 - decay) * parameters."""
        shadow = list(self.shadow.values())
        current = [value.detach().to(shadow[0].device, torch.float32) for value in self._parameters.values()]
        torch._foreach_lerp_(shadow, current, 1 - decay)


class Ema(Average):
    """decay = min(decay, (1 + n) / (10 + n)) after n updates: short at first, as in Stable Diffusion's own training."""

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], decay: float) -> None:
        super().__init__(parameters)
        self.decay = decay
        self.updates = 0

    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        self.follow(decay)

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


class PowerEma(Average):
    """The weights after t images count in proportion to t^gamma, so the average's length is a share of the run so far.

    decay = (1 - b / t)^(gamma + 1) after t images, b of them in this step (Karras et al. 2024, equation 127, in images).
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], sigma_rel: float) -> None:
        """`sigma_rel`: the standard deviation of its profile, as a share of the run so far."""
        super().__init__(parameters)
        self.power = exponent(sigma_rel) + 1

    def update(self, images_seen: int, images: int) -> None:
        """After a step of so many images, which ends at `images_seen`."""
        self.follow((1 - images / images_seen) ** self.power)
