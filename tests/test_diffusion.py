"""Noise and losses are the papers', and chance is a function of (seed, epoch, sample) alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from momalisa.config import Diffusion
from momalisa.diffusion import Schedule, draws, generator, loss_per_sample

SHAPE = (4, 4, 4)


@pytest.fixture(scope="module")
def schedule(tiny_base: Path) -> Schedule:
    return Schedule.load(Diffusion(model=str(tiny_base)))


def test_noise_is_added_as_diffusers_does(tiny_base: Path, schedule: Schedule) -> None:
    theirs = DDPMScheduler.from_pretrained(tiny_base, subfolder="scheduler")
    source = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn((6, *SHAPE), generator=source) for _ in range(2))
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps), rtol=1e-6, atol=1e-6
    )
    assert len(schedule) == 1000


def test_min_snr_weights(schedule: Schedule) -> None:
    timesteps = torch.arange(1000)
    alphas = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    snr = alphas / (1 - alphas)
    expected = torch.minimum(snr, torch.tensor(5.0)) / snr
    torch.testing.assert_close(schedule.weights(timesteps, 5.0), expected, rtol=1e-4, atol=0)
    weights = schedule.weights(timesteps, 5.0)
    assert weights[0] < 0.01  # nearly clean: hardly counts
    assert weights[-1] == 1
    assert torch.equal(schedule.weights(timesteps, None), torch.ones(1000))


def test_a_model_that_predicts_something_else_is_refused(tmp_path: Path) -> None:
    DDPMScheduler(prediction_type="sample").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="predicts 'sample', not 'epsilon' or 'v_prediction'"):
        Schedule.load(Diffusion(model=str(tmp_path)))


def test_what_a_model_predicts_is_its_target(tmp_path: Path, schedule: Schedule) -> None:
    PNDMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    of_v = Schedule.load(Diffusion(model=str(tmp_path)))
    source = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn((5, *SHAPE), generator=source) for _ in range(2))
    timesteps = torch.tensor([0, 10, 500, 900, 999])
    expected = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler").get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(of_v.target(latents, noise, timesteps), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(schedule.target(latents, noise, timesteps), noise)


samples = st.lists(st.tuples(st.integers(0, 3), st.text(max_size=4)), min_size=1, max_size=8, unique=True)


@settings(deadline=None, max_examples=50)
@given(batch=samples, data=st.data(), seed=st.integers(0, 5))
def test_a_samples_draws_do_not_know_the_batch(batch: list[tuple[int, str]], data: st.DataObject, seed: int) -> None:
    whole = draws(seed, batch, SHAPE, 1000, 0.5)
    order = data.draw(st.permutations(range(len(batch))))
    part = order[: data.draw(st.integers(1, len(batch)))]
    torch.rand(3)  # nor the global generator
    some = draws(seed, [batch[i] for i in part], SHAPE, 1000, 0.5)
    for name in ("latent_noise", "noise", "timesteps", "dropped", "prompts", "flipped"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[part]), name


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    work=st.text(max_size=4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dropout=st.floats(0, 1),
    offset=st.sampled_from([0.0, 0.1]),
)
def test_what_is_drawn_first_stays_what_it_was(
    seed: int, epoch: int, work: str, height: int, width: int, dropout: float, offset: float
) -> None:
    """Whether a work is flipped is drawn last, so that runs of before draw what they drew; it knows of no setting."""
    shape = (4, height, width)
    found = draws(seed, [(epoch, work)], shape, 1000, dropout, offset)
    source = generator(seed, epoch, work)
    latent_noise, noise = (torch.randn(shape, generator=source) for _ in range(2))
    assert int(found.timesteps) == int(torch.randint(0, 1000, (), generator=source))
    assert bool(found.dropped) == bool(torch.rand((), generator=source) < dropout)
    assert int(found.prompts) == int(torch.randint(0, 2**31, (), generator=source))
    constant = torch.randn((4, 1, 1), generator=source)
    assert torch.equal(found.latent_noise[0], latent_noise)
    assert torch.equal(found.noise[0], noise + offset * constant if offset else noise)
    assert bool(found.flipped) == bool(torch.rand((), generator=source) < 0.5)


def test_draws_differ_by_seed_epoch_and_sample_and_within_a_sample() -> None:
    keys = [(0, (0, "a")), (1, (0, "a")), (0, (1, "a")), (0, (0, "b"))]
    found = [draws(seed, [key], SHAPE, 1000, 0.5) for seed, key in keys]
    noises = [noise for drawn in found for noise in (drawn.noise, drawn.latent_noise)]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 8


def test_draws_are_of_the_right_kind() -> None:
    drawn = draws(0, [(0, str(i)) for i in range(2000)], (1, 2, 2), 1000, 0.1)
    assert (drawn.noise.shape, drawn.timesteps.dtype, drawn.dropped.dtype) == ((2000, 1, 2, 2), torch.int64, torch.bool)
    assert abs(float(drawn.noise.mean())) < 0.05
    assert abs(float(drawn.latent_noise.std()) - 1) < 0.05
    assert abs(float(drawn.timesteps.float().mean()) - 499.5) < 30
    assert int(drawn.timesteps.min()) >= 0
    assert int(drawn.timesteps.max()) <= 999
    assert abs(float(drawn.dropped.float().mean()) - 0.1) < 0.03
    assert drawn.flipped.dtype == torch.bool
    assert abs(float(drawn.flipped.float().mean()) - 0.5) < 0.04
    assert abs(float(drawn.flipped[drawn.dropped].float().mean()) - 0.5) < 0.12  # whatever else is drawn
    assert not draws(0, [(0, str(i)) for i in range(50)], (1, 1, 1), 1000, 0.0).dropped.any()
    assert draws(0, [(0, str(i)) for i in range(50)], (1, 1, 1), 1000, 1.0).dropped.all()


def test_a_work_is_flipped_in_about_half_of_the_epochs() -> None:
    epochs = torch.stack([draws(3, [(epoch, "a"), (epoch, "b")], (1, 1, 1), 1000, 0.1).flipped for epoch in range(400)])
    assert ((epochs.float().mean(0) - 0.5).abs() < 0.1).all()
    assert abs(float((epochs[:, 0] == epochs[:, 1]).float().mean()) - 0.5) < 0.1


def test_a_generators_key_is_all_that_matters() -> None:
    assert torch.equal(torch.rand(4, generator=generator(0, "a")), torch.rand(4, generator=generator(0, "a")))
    assert not torch.equal(torch.rand(4, generator=generator(0, "a")), torch.rand(4, generator=generator("0", "a")))


def test_the_loss_of_a_sample_is_its_own_mean_square() -> None:
    predicted, noise = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert loss_per_sample(predicted.bfloat16(), noise).tolist() == [1.0, 4.0]
