"""Averages whose length is chosen afterwards: the formulas, and what is made of snapshots beside what was tracked."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from momalisa.training.ema import PowerEma
from momalisa.training.profile import LONGEST_EMA, STORED, Profile, coefficients, exponent, length


@given(st.floats(0.005, LONGEST_EMA))
def test_an_exponent_has_its_length(sigma_rel: float) -> None:
    assert length(exponent(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-6)


def test_the_published_exponents() -> None:
    """Karras et al. 2024, section 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert [round(exponent(sigma), 2) for sigma in STORED] == [16.97, 6.94]


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, float("nan")])
def test_a_length_that_no_power_function_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.28"):
        exponent(sigma_rel)


def follow(sigma_rel: float, trajectory: torch.Tensor, batch: int) -> torch.Tensor:
    """The average after every step [steps, D] of a trajectory [steps, D]."""
    weight = Parameter(torch.full_like(trajectory[0], 9.0))  # whose start does not count
    ema, found = PowerEma([("w", weight)], sigma_rel), []
    for step, value in enumerate(trajectory, 1):
        with torch.no_grad():
            weight.copy_(value)
        ema.update(step * batch, batch)
        found.append(ema.shadow["w"].clone())
    return torch.stack(found)


@pytest.mark.parametrize("sigma_rel", STORED)
def test_an_average_weighs_the_weights_by_its_profile(sigma_rel: float) -> None:
    """p(t) = (gamma + 1) t^gamma / T^(gamma + 1), over the images of each step."""
    trajectory = torch.randn((50, 3), generator=torch.Generator().manual_seed(0))
    edges = (torch.arange(51, dtype=torch.float64) / 50) ** (exponent(sigma_rel) + 1)
    expected = (edges.diff()[:, None] * trajectory).sum(0).float()
    torch.testing.assert_close(follow(sigma_rel, trajectory, batch=8)[-1], expected, rtol=1e-4, atol=1e-5)


def test_an_average_counts_images_and_not_steps() -> None:
    """Weights that stay for two steps of 4 images, or for one of 8, have the same average."""
    trajectory = torch.randn((40, 3), generator=torch.Generator().manual_seed(1))
    twice = follow(0.1, trajectory.repeat_interleave(2, 0), batch=4)
    torch.testing.assert_close(follow(0.1, trajectory, batch=8), twice[1::2], rtol=1e-4, atol=1e-5)


def test_a_stored_average_is_itself() -> None:
    stored = [Profile(images, sigma) for images in (100, 200, 300) for sigma in STORED]
    for number, one in enumerate(stored):
        assert coefficients(stored, one) == ([float(place == number) for place in range(6)], 0.0)


@settings(max_examples=25, deadline=None)
@given(
    sigma_rel=st.floats(0.04, 0.15),
    snapshots=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["noise", "walk"]),
)
def test_another_length_is_as_if_it_had_been_tracked(sigma_rel: float, snapshots: int, seed: int, kind: str) -> None:
    """Within the distance of the profiles, which the least squares say and which 8 snapshots keep below 3.5%.

    For weights of noise the error's standard deviation is that share of the average's own, so it is 6 times that at the most.
    """
    steps, batch = 320, 4
    trajectory = torch.randn((steps, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "walk":
        trajectory = trajectory.cumsum(0) / steps**0.5
    direct = follow(sigma_rel, trajectory, batch)[-1]
    kept = {sigma: follow(sigma, trajectory, batch) for sigma in STORED}
    every = steps // snapshots
    places = [(step, sigma) for step in range(every, steps + 1, every) for sigma in STORED]
    shares, left = coefficients([Profile(step * batch, sigma) for step, sigma in places], Profile(steps * batch, sigma_rel))
    assert left < 0.035
    assert sum(shares) == pytest.approx(1, abs=1e-9)  # what does not move is not moved
    made = sum(share * kept[sigma][step - 1] for share, (step, sigma) in zip(shares, places, strict=True))
    assert isinstance(made, torch.Tensor)
    spread = trajectory.std() if kind == "noise" else trajectory.abs().max()
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (exponent(sigma_rel) + 1)
    own = float(edges.diff().norm()) if kind == "noise" else 1.0
    assert float((made - direct).abs().max()) < 6 * max(left, 0.002) * own * float(spread)


def test_more_snapshots_are_nearer() -> None:
    left = []
    for count in (2, 4, 8, 16, 32):
        stored = [Profile(step, sigma) for step in range(1, count + 1) for sigma in STORED]
        left.append(coefficients(stored, Profile(count, 0.15))[1])
    assert all(more > fewer for more, fewer in pairwise(left))
    assert left[-1] < 0.005
    assert np.isfinite(left).all()
