"""The evidence: unbiased distances, paired intervals, and one grid of noise for every checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from momalisa import checkpoint as checkpoints
from momalisa.config import Diffusion
from momalisa.diffusion import Schedule
from momalisa.latents import TextEncoder
from momalisa.miniature import models
from momalisa.quality import KERNEL_BANDWIDTH, ClipFeatures, held_out_losses, mmd2, paired_difference
from momalisa.training.cache import LatentCache


def naive_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Gretton et al. 2012, equation 3, term by term."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * KERNEL_BANDWIDTH**2))

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return 1000 * (within_x + within_y - 2 * between)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 7), m=st.integers(2, 7), seed=st.integers(0, 2**32), shift=st.floats(0, 20))
def test_mmd2_is_the_papers_estimate_symmetric_and_blind_to_order(n: int, m: int, seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = 5 * rng.normal(size=(n, 3)), 5 * rng.normal(size=(m, 3)) + shift
    found = mmd2(x, y)
    assert found == pytest.approx(naive_mmd2(x, y), abs=1e-8)
    assert mmd2(y, x) == pytest.approx(found, abs=1e-8)
    assert mmd2(rng.permutation(x), rng.permutation(y)) == pytest.approx(found, abs=1e-8)


def test_mmd2_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    same = np.array([mmd2(5 * rng.normal(size=(4, 3)), 5 * rng.normal(size=(6, 3))) for _ in range(3000)])
    error = same.std() / math.sqrt(len(same))
    assert abs(same.mean()) < 4 * error
    assert error < 2  # the biased estimate of such small samples lies about 80 above
    assert (same < 0).any()


def test_mmd2_grows_with_the_distance() -> None:
    rng = np.random.default_rng(0)
    x, y = 5 * rng.normal(size=(100, 3)), 5 * rng.normal(size=(100, 3))
    values = [mmd2(x, y + shift) for shift in (0, 2, 4, 8)]
    assert values == sorted(values)
    assert values[-1] > 20 * abs(values[0])


@pytest.mark.parametrize(("n", "m"), [(1, 5), (5, 1), (0, 2)])
def test_mmd2_needs_two_on_each_side(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"two pictures on each side are needed, got {n} and {m}"):
        mmd2(np.zeros((n, 3)), np.zeros((m, 3)))


def test_a_paired_difference_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(3), 0
    for _ in range(200):
        base = rng.normal(10, 5, size=40)
        found = paired_difference(base, base - 0.5 + rng.normal(0, 1, size=40), resamples=400)
        covered += found.low <= -0.5 <= found.high
        assert found.low <= found.mean <= found.high
        assert found.high - found.low < 1.5  # paired: the works' own spread of 5 is not in it
    assert 0.88 * 200 <= covered <= 0.99 * 200


def test_a_paired_difference_is_candidate_minus_base_and_repeatable() -> None:
    base, candidate = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.5, 2.5])
    found = paired_difference(base, candidate)
    assert (found.mean, found.low, found.high) == (-0.5, -0.5, -0.5)
    noisy = candidate + np.array([0.1, 0.3, -0.2])
    assert paired_difference(base, noisy) == paired_difference(base, noisy)


@pytest.mark.parametrize(("base", "candidate"), [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_losses_of_other_works_are_refused(base: tuple[int, ...], candidate: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="losses of the same works are needed"):
        paired_difference(np.zeros(base), np.zeros(candidate))


def works(names: list[str]) -> LatentCache:
    source = torch.Generator().manual_seed(5)
    moments, token_ids = torch.randn((9, 8, 4, 4), generator=source), torch.randint(0, 600, (9, 77), generator=source)
    picked = [int(name) for name in names]
    return LatentCache(names, names, moments[picked].half(), token_ids[picked])


def test_held_out_losses_know_neither_batch_nor_company_nor_repetition(tiny_base: Path) -> None:
    diffusion = Diffusion(model=str(tiny_base))
    parts = checkpoints.load_base_unet(diffusion), Schedule.load(diffusion), TextEncoder.load(diffusion), 0.2
    everyone = works(list("01234"))
    found = held_out_losses(*parts, everyone, timesteps=3, batch=4)
    assert found.shape == (5,)
    assert found.dtype == np.float64
    torch.rand(5)
    assert np.array_equal(found, held_out_losses(*parts, everyone, timesteps=3, batch=4))
    np.testing.assert_allclose(held_out_losses(*parts, everyone, timesteps=3, batch=7), found, rtol=1e-5)
    np.testing.assert_allclose(held_out_losses(*parts, works(list("31")), timesteps=3, batch=1), found[[3, 1]], rtol=1e-5)
    assert len(set(found.round(9))) == 5
    mirrored = replace(everyone, mirrored=torch.full_like(everyone.stacked(), torch.nan))
    assert np.array_equal(held_out_losses(*parts, mirrored, timesteps=3, batch=4), found)  # no work is flipped


def test_held_out_losses_are_of_the_noise(tiny_base: Path) -> None:
    """A model that says nothing is wrong by the noise's own square, which is about one."""
    diffusion = Diffusion(model=str(tiny_base))
    unet = checkpoints.load_base_unet(diffusion)
    for value in unet.conv_out.parameters():
        value.data.zero_()
    found = held_out_losses(unet, Schedule.load(diffusion), TextEncoder.load(diffusion), 0.2, works(list("01234")), 6, 30)
    np.testing.assert_allclose(found, 1.0, atol=0.3)
    assert abs(found.mean() - 1) < 0.1


def test_clip_features_are_clips_own_image_embeddings(tmp_path: Path) -> None:
    tokenizer = models.build_clip_tokenizer()
    torch.manual_seed(0)
    clip = models.build_clip(tokenizer).eval()
    clip.save_pretrained(tmp_path)
    processor = models.clip_processor(tokenizer)
    processor.save_pretrained(tmp_path)
    pictures = [Image.new("RGB", (90, 120), colour) for colour in ("red", "white", "#123456")]
    found = ClipFeatures(str(tmp_path), None)(pictures, batch=2)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    inputs = processor(text=["x"] * 3, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = clip(**inputs).image_embeds
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
