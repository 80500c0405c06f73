"""A square holds the very pixels that a model's own processor makes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BlipImageProcessorPil

from momalisa.miniature import draw
from momalisa.square import Square

PICTURE = draw.draw(draw.all_scenes()[3], seed=1).resize((300, 200))


def grained(width: int, height: int) -> Image.Image:
    """Hard edges and grain, where filters differ most."""
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    values[height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 20)
    return Image.fromarray(values)


def theirs(picture: Image.Image, size_px: int) -> np.ndarray:
    """The square of transformers' own processor."""
    processor = BlipImageProcessorPil(size={"height": size_px, "width": size_px}, do_normalize=False, do_rescale=False)
    return processor(images=picture, return_tensors="np").pixel_values[0].transpose(1, 2, 0)


def assert_same(picture: Image.Image, size_px: int) -> None:
    """Up to rounding and clipping, between the two passes and after them."""
    off = np.abs(Square(size_px)(picture).astype(int) - theirs(picture, size_px))
    assert off.max() <= 32  # noise is the hardest, where a pass overshoots
    assert off.mean() < 1.0


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_squeezed_pixels_are_those_of_transformers(mode: str) -> None:
    assert_same(PICTURE.convert(mode), 48)


@pytest.mark.parametrize(
    "size", [(1024, 700), (640, 480), (120, 90), (30, 900), (2600, 1800)]
)  # the last is too large to be lent
def test_of_every_size_and_at_the_hardest_edges(size: tuple[int, int]) -> None:
    assert_same(grained(*size), 384)


def test_what_looks_like_a_photograph_is_off_by_a_level_or_two() -> None:
    rng = np.random.default_rng(3)
    soft = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((1024, 768), Image.Resampling.BICUBIC)
    picture = Image.fromarray(np.clip(np.asarray(soft) + rng.normal(0, 4.5, (768, 1024, 1)), 0, 255).astype(np.uint8))
    off = np.abs(Square(384)(picture).astype(int) - theirs(picture, 384))
    assert off.max() <= 2
    assert off.mean() < 0.05


def test_a_square_of_the_right_size_is_the_picture_itself() -> None:
    picture = grained(384, 384)
    np.testing.assert_array_equal(Square(384)(picture), np.asarray(picture))


@pytest.mark.parametrize("side", [64, 300])
def test_a_square_outlives_its_picture(side: int) -> None:
    made = Square(64)(grained(side, side))
    kept = made.copy()
    for _ in range(20):
        Square(64)(Image.new("RGB", (side, side)))
    np.testing.assert_array_equal(made, kept)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_any_size_becomes_any_square(width: int, height: int, size_px: int) -> None:
    assert_same(grained(width, height), size_px)


def test_the_centre_is_kept_in_proportion() -> None:
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    pixels = Square(50, Image.Resampling.LANCZOS, keep="centre")(picture)
    assert pixels.shape == (50, 50, 3)
    assert (pixels[:, 4:-4] == (0, 0, 255)).all()  # at its edge the filter sees a little beyond the box


def test_it_is_light() -> None:
    code = "import sys, momalisa.square; assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
