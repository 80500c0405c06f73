"""Every picture has a bucket near its own proportions and near the square's area."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from momalisa.buckets import MAX_RATIO, Bucketed, buckets, nearest
from momalisa.latents import square

resolutions = st.sampled_from([(64, 8), (128, 16), (256, 32), (512, 64), (768, 64), (520, 64), (1024, 64)])
sides = st.integers(1, 5000)


def test_the_buckets_of_stable_diffusion() -> None:
    found = buckets(512, 64)
    assert {(512, 512), (576, 448), (640, 384), (768, 320), (1024, 256), (256, 1024)} <= set(found)
    assert len(found) < 25  # each is compiled once
    assert all(abs(width * height / 512**2 - 1) < 0.13 for width, height in found)


@given(chosen=resolutions, width=sides, height=sides)
def test_a_bucket_is_near_in_area_and_whole_in_steps(chosen: tuple[int, int], width: int, height: int) -> None:
    resolution, step = chosen
    wide, high = nearest(width, height, resolution, step)
    assert (wide, high) == (resolution, resolution) or (wide % step, high % step) == (0, 0)
    assert 0.8 < wide * high / resolution**2 < 1.25
    assert nearest(height, width, resolution, step) == (high, wide)
    assert nearest(wide, high, resolution, step) == (wide, high)
    assert nearest(width, width, resolution, step) == (resolution, resolution)


@given(chosen=resolutions, width=sides, height=sides)
def test_hardly_anything_is_cut_off(chosen: tuple[int, int], width: int, height: int) -> None:
    """A centre crop loses a third of a 3:2 picture; a bucket at most a seventh."""
    wide, high = nearest(width, height, *chosen)
    if max(width, height) <= MAX_RATIO * min(width, height):
        assert math.exp(-abs(math.log(width / height) - math.log(wide / high))) > 6 / 7


@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_pixels_have_the_buckets_size(width: int, height: int) -> None:
    made = Bucketed(64, 8)(Image.new("RGB", (width, height), (10, 200, 30)))
    assert made.shape[1::-1] == nearest(width, height, 64, 8)
    assert (made == [10, 200, 30]).all()


def test_both_ends_of_a_long_picture_are_seen() -> None:
    array = np.zeros((100, 200, 3), dtype=np.uint8)
    array[:, :20] = (255, 0, 0)
    array[:, -20:] = (0, 0, 255)
    made = Bucketed(64, 8)(Image.fromarray(array)).astype(int)
    assert made.shape == (48, 88, 3)
    assert made[24, 1, 0] > 240
    assert made[24, -2, 2] > 240


@pytest.mark.parametrize("side", [31, 64, 200])
def test_a_square_picture_is_what_it_was_without_buckets(side: int) -> None:
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    assert np.array_equal(Bucketed(64, 8)(picture), square(64)(picture))
