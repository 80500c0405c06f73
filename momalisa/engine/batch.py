"""Trajectories that take their steps together, each at its own timestep, sampler and scale.

B pictures are B + G rows of the UNet: first every picture with its prompt, then the G guided ones with their negative one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from momalisa.engine.samplers import ESTIMATE, LATENTS, SLOTS
from momalisa.engine.trajectory import Trajectory

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Latents [R, C, h, w], timesteps [R] and text states [R, L, D] -> the model's output [R, C, h, w], all float32."""


class Batch:
    """The tensors of a few trajectories of one latent size."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.trajectories: list[Trajectory] = []
        self._state = torch.empty(0)  # [B, 5, C, h, w] float32: the sampler's state, then the model's output
        self._prompts = torch.empty(0)  # [B, 2, L, D]: prompt, negative prompt
        self._rows: tuple[tuple[bool, ...], Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def rows(self) -> int:
        """UNet rows of its widest step."""
        return sum(trajectory.most_rows for trajectory in self.trajectories)

    def join(self, trajectory: Trajectory, latents: Tensor, prompts: Tensor) -> None:
        """Latents [C, h, w] float32 and prompts [2, L, D]; its first step is the next one."""
        state = latents.new_zeros((1, SLOTS + 1, *latents.shape))
        state[0, LATENTS] = latents
        first = not self.trajectories
        self._state = state if first else torch.cat([self._state, state])
        self._prompts = prompts[None] if first else torch.cat([self._prompts, prompts[None]])
        self.trajectories.append(trajectory)
        self._rows = None

    def drop(self, ids: Iterable[int]) -> None:
        """Forget trajectories, finished or not."""
        gone = set(ids)
        kept = [index for index, trajectory in enumerate(self.trajectories) if trajectory.id not in gone]
        if len(kept) == len(self.trajectories):
            return
        where = self._sent(torch.tensor(kept, dtype=torch.long))
        self.trajectories = [self.trajectories[index] for index in kept]
        self._state, self._prompts = self._state[where], self._prompts[where]
        self._rows = None

    def latents(self, index: int) -> Tensor:
        """[C, h, w] float32."""
        return self._state[index, LATENTS]

    def estimate(self, indices: list[int]) -> Tensor:
        """Where trajectories are going [N, C, h, w]: x0 as the model sees it now."""
        return self._state[self._sent(torch.tensor(indices)), ESTIMATE]

    @torch.no_grad()
    def step(self, model: Model) -> None:
        """One sampler step of every trajectory."""
        pictures = len(self.trajectories)
        factors = self._sent(torch.stack([trajectory.table.factors[trajectory.done] for trajectory in self.trajectories]))
        timesteps, scales = factors[:, -2].contiguous(), factors[:, -1].view(-1, 1, 1, 1)
        guided, weights, states = self._layout()
        latents = self._state[:, LATENTS] * scales
        if len(guided):
            output = model(torch.cat([latents, latents[guided]]), torch.cat([timesteps, timesteps[guided]]), states)
            output, unconditional = output[:pictures], output[pictures:]
            # Ho & Salimans 2022: e = e_uncond + s (e_cond - e_uncond), for the rows that ask for it
            output = output.index_copy(0, guided, unconditional + weights * (output[guided] - unconditional))
        else:
            output = model(latents, timesteps, states)
        self._state[:, SLOTS] = output
        flat = self._state.flatten(2)
        flat[:, :SLOTS] = torch.bmm(factors[:, :-2].view(-1, SLOTS, SLOTS + 1), flat)
        for index, trajectory in enumerate(self.trajectories):
            trajectory.done += 1
            self._keep_known(index, trajectory)

    def _keep_known(self, index: int, trajectory: Trajectory) -> None:
        """Inpainting: what is not repainted is the image again, as noisy as it now should be."""
        known = trajectory.known
        if known is not None:
            image = trajectory.known_latents(trajectory.done, known.image, known.noise)
            self._state[index, LATENTS] = torch.where(known.mask > 0, self._state[index, LATENTS], image)

    def _layout(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which pictures are guided [G], by how much [G, 1, 1, 1], and the text states of all rows [B + G, L, D]."""
        pattern = tuple(trajectory.guided for trajectory in self.trajectories)
        if self._rows is None or self._rows[0] != pattern:
            indices = [index for index, guided in enumerate(pattern) if guided]
            scales = [self.trajectories[index].request.guidance_scale for index in indices]
            where = self._sent(torch.tensor(indices, dtype=torch.long))
            weights = self._sent(torch.tensor(scales, dtype=torch.float32)).view(-1, 1, 1, 1)
            states = torch.cat([self._prompts[:, 0], self._prompts[where, 1]])
            self._rows = (pattern, where, weights, states)
        return self._rows[1:]

    def _sent(self, values: Tensor) -> Tensor:
        """Small values on the device. From pinned memory a GPU fetches them in turn, and nobody waits for the step it is at."""
        if self.device.type == "cuda" and len(values):
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)
