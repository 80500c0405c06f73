"""Deterministic samplers as tables of coefficients, so that one batch holds rows of any sampler at any step.

Between two steps a sampler remembers a few tensors that all have the latents' shape: the state. A step is linear in the
state and in the model's output, whatever the sampler, unless it clips: so pushing basis vectors through diffusers' own
scheduler gives the step's matrix, and a batch of steps is one product of small matrices.

    state = [x, m, m', c]     x: latents; m: the newest estimate of x0; m': the one before; c: UniPC's corrected sample
    state_{i+1} = M_i [state_i; output_i]                                M_i [4, 5]

Samplers: DDIM (Song et al. 2021), Euler (Karras et al. 2022), DPM-Solver++ 2M (Lu et al. 2022), UniPC (Zhao et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from momalisa.config import Diffusion
from momalisa.engine.request import Sampler
from momalisa.weights import locate

SLOTS = 4  # of the state
LATENTS, ESTIMATE = 0, 1  # slots: x, and x0 as the model sees it now
KINDS: dict[Sampler, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "predict_x0": True}),
}


@dataclass(frozen=True)
class Table:
    """A sampler's whole way from one start, of n steps. Float32, on the CPU."""

    factors: Tensor  # [n, 22]: a step's matrix row by row, its timestep, and by how much the model sees latents scaled
    known: Tensor  # [n + 1, 2]: factors of (image, noise) that give the image's latents before step i; the last (1, 0)
    sigmas: Tensor  # [n]: noise per signal that the model sees, sqrt((1 - abar) / abar)
    noise_scale: float  # pure noise times this are the first latents

    def __len__(self) -> int:
        return len(self.factors)


class Samplers:
    """The tables of one noise schedule. Raises ValueError for a schedule that is not linear."""

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("thresholding"):
            raise ValueError("the model's scheduler has thresholding=true, which no table can hold: set it to false")
        self.config = config
        self.table = lru_cache(maxsize=256)(self._table)

    def scheduler(self, sampler: Sampler) -> Any:
        """diffusers' own scheduler of that name on this schedule."""
        import diffusers

        name, options = KINDS[sampler]
        return getattr(diffusers, name).from_config(self.config, **options)

    def _table(self, sampler: Sampler, steps: int, start: int) -> Table:
        """Cached as `table`. Raises ValueError where the schedule has not that many steps."""
        scheduler = self.scheduler(sampler)
        most = int(scheduler.config.num_train_timesteps) - 1
        if steps > most:
            raise ValueError(f"steps={steps} is more than {most}, all that the model's schedule has; try 20")
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        timesteps = scheduler.timesteps[start:]
        factors: list[Tensor] = []
        known = [_known(scheduler, timesteps[:1])]
        for index, timestep in enumerate(timesteps):
            scale = scheduler.scale_model_input(torch.ones(1), timestep)
            matrix = _matrix(scheduler, timestep, first=index == 0)
            factors.append(torch.cat([matrix.flatten(), timestep.float().view(1), scale]))
            last = index == len(timesteps) - 1
            known.append(torch.tensor([1.0, 0.0]) if last else _known(scheduler, timesteps[index + 1 : index + 2]))
        levels = torch.stack(known)
        return Table(torch.stack(factors), levels, levels[:-1, 1] / levels[:-1, 0], float(scheduler.init_noise_sigma))


def scheduler_config(diffusion: Diffusion) -> dict[str, Any]:
    """The base model's published noise schedule. Raises ValueError where it cannot be loaded."""
    from diffusers import DPMSolverMultistepScheduler

    where = locate(diffusion.model)
    try:
        return dict(DPMSolverMultistepScheduler.load_config(where, subfolder="scheduler", revision=diffusion.revision))
    except OSError as error:
        raise ValueError(f"cannot load {diffusion.model} (scheduler): {' '.join(str(error).split())}") from error


def _matrix(scheduler: Any, timestep: Tensor, first: bool) -> Tensor:
    """One step of diffusers' scheduler -> [4, 5], by basis vectors for the state and for the model's output."""
    latents, newest, older, corrected, output = torch.eye(SLOTS + 1).unsqueeze(1)  # [1, 5] each
    if not first:
        if hasattr(scheduler, "model_outputs"):
            scheduler.model_outputs = [older, newest]
        if hasattr(scheduler, "last_sample"):
            scheduler.last_sample = corrected
    result = scheduler.step(output, timestep, latents)
    nothing = torch.zeros_like(latents)
    outputs = getattr(scheduler, "model_outputs", [None, result.get("pred_original_sample")])
    new = [result.prev_sample, outputs[-1], outputs[-2], getattr(scheduler, "last_sample", None)]
    return torch.cat([nothing if value is None else value for value in new])


def _known(scheduler: Any, timestep: Tensor) -> Tensor:
    """The factors [2] of image and noise in diffusers' noised latents."""
    image, noise = torch.eye(2).unsqueeze(1)
    noised: Tensor = scheduler.add_noise(image, noise, timestep)
    return noised[0]
