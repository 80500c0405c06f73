"""A table steps as diffusers' scheduler does, for any model, sampler, number of steps and start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momalisa.diffusion import ZERO_TERMINAL_SNR
from momalisa.engine import SAMPLERS, Sampler
from momalisa.engine.samplers import ESTIMATE, LATENTS, SLOTS, Samplers
from momalisa.miniature.models import build_scheduler

SD = dict(build_scheduler().config)  # Stable Diffusion 1.4's
SHAPE = (1, 4, 8, 8)


def model(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    """Anything that is not linear."""
    return torch.sin(latents * 3) * (1 + timestep / 1000) + torch.roll(latents, 1, dims=-1).tanh()


def noise(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def by_scheduler(samplers: Samplers, sampler: Sampler, steps: int, start: int) -> list[torch.Tensor]:
    """Latents after every step."""
    scheduler = samplers.scheduler(sampler)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(start) if hasattr(scheduler, "set_begin_index") else None
    timesteps = scheduler.timesteps[start:]
    latents = scheduler.add_noise(noise(1), noise(2), timesteps[:1]) if start else noise(2) * scheduler.init_noise_sigma
    seen = [latents]
    for timestep in timesteps:
        output = model(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(output, timestep, latents).prev_sample
        seen.append(latents)
    return seen


def by_table(samplers: Samplers, sampler: Sampler, steps: int, start: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Latents after every step, and the last estimate of x0."""
    table = samplers.table(sampler, steps, start)
    state = torch.zeros(SLOTS, *SHAPE)
    state[LATENTS] = table.known[0, 0] * noise(1) + table.known[0, 1] * noise(2) if start else noise(2) * table.noise_scale
    seen = [state[LATENTS].clone()]
    for factors in table.factors:
        output = model(state[LATENTS] * factors[-1], float(factors[-2]))
        state = torch.einsum("ij,j...->i...", factors[:-2].view(SLOTS, SLOTS + 1), torch.cat([state, output[None]]))
        seen.append(state[LATENTS])
    return seen, state[ESTIMATE]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sampler=st.sampled_from(SAMPLERS),
    steps=st.integers(1, 60),
    share=st.floats(0, 0.99),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    zero_terminal_snr=st.booleans(),
)
def test_every_step_equals_the_scheduler(
    sampler: Sampler, steps: int, share: float, prediction: str, spacing: str, zero_terminal_snr: bool
) -> None:
    schedule = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
    if zero_terminal_snr:
        schedule |= {"prediction_type": "v_prediction", **ZERO_TERMINAL_SNR}
    samplers = Samplers(schedule)
    start = int(share * steps)
    expected, (found, _) = by_scheduler(samplers, sampler, steps, start), by_table(samplers, sampler, steps, start)
    assert len(found) == steps - start + 1
    for one, other in zip(expected, found, strict=True):
        near = 2e-3 if zero_terminal_snr else 2e-4  # its first noise level is 4096: float32 has fewer digits left
        torch.testing.assert_close(other, one, rtol=near, atol=near * float(one.abs().max()))


@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if sampler != "ddim"])
def test_the_last_estimate_is_where_it_ends(sampler: Sampler) -> None:
    latents, estimate = by_table(Samplers(SD), sampler, 12, 0)
    torch.testing.assert_close(estimate, latents[-1], rtol=1e-3, atol=1e-3)


def test_samplers_differ() -> None:
    ends = [by_table(Samplers(SD), sampler, 6, 0)[0][-1] for sampler in SAMPLERS]
    apart = [float((a - b).abs().max()) for index, a in enumerate(ends) for b in ends[:index]]
    assert min(apart) > 0.05


def test_a_table_is_made_once() -> None:
    samplers = Samplers(SD)
    assert samplers.table("euler", 5, 0) is samplers.table("euler", 5, 0)
    assert samplers.table("euler", 5, 0) is not samplers.table("euler", 5, 1)


def test_thresholding_is_refused() -> None:
    with pytest.raises(ValueError, match="thresholding=true"):
        Samplers({**SD, "thresholding": True})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_steps_than_the_schedule_has(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="steps=1000 is more than 999"):
        Samplers(SD).table(sampler, 1000, 0)


def test_a_base_s_own_clipping_and_order_do_not_reach_a_table() -> None:
    config: dict[str, Any] = {**SD, "clip_sample": True, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}
    for sampler in SAMPLERS:
        torch.testing.assert_close(Samplers(config).table(sampler, 4, 0).factors, Samplers(SD).table(sampler, 4, 0).factors)
