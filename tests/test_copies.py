"""Copies are found, mirrored ones too, and other pictures of the same collection are none."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageOps

from momalisa import copies
from momalisa.collect.phash import look
from momalisa.miniature import draw


def drawings(count: int, first: int) -> list[Image.Image]:
    rng = random.Random(first)
    return [draw.draw(draw.sample_scene(rng), first + i) for i in range(count)]


def test_a_distance_is_the_root_mean_square_difference_of_the_nearest() -> None:
    white, grey, black = (np.full((1, 16, 16, 3), value, np.float32) for value in (1.0, 0.5, 0.0))
    assert copies.nearest(white, np.concatenate([grey, black])) == pytest.approx([0.5])
    both = np.concatenate([white, grey, black])
    assert copies.nearest(both, both) == pytest.approx([0, 0, 0], abs=1e-6)
    assert copies.nearest(both, both, own=np.arange(3)) == pytest.approx([0.5, 0.5, 0.5])


def test_a_mirrored_copy_is_a_copy_and_a_retouched_one_too() -> None:
    pictures = drawings(60, 0)
    training, held_out = copies.features(pictures[:40]), copies.features(pictures[40:])
    limit = copies.threshold(training, held_out)
    turned = np.sqrt(((training - training[:, :, ::-1]) ** 2).mean(axis=(1, 2, 3)))
    lopsided = pictures[int(turned.argmax())]
    assert turned.max() > 2 * limit
    again = [ImageOps.mirror(lopsided), pictures[5].resize((64, 64)), pictures[7].point(lambda value: min(255, value + 6))]
    assert (copies.nearest(copies.features(again), training) < limit).all()
    fresh = copies.nearest(copies.features(drawings(40, 500)), training)
    assert copies.rate(fresh.tolist(), limit).share <= 0.1


def test_large_halves_are_compared_in_pieces_and_the_same() -> None:
    random_ = np.random.default_rng(0)
    these, others = random_.random((600, 16, 16, 3), np.float32), random_.random((30, 16, 16, 3), np.float32)
    whole = copies.nearest(these, others)
    assert np.allclose(whole[::50], [copies.nearest(these[i : i + 1], others)[0] for i in range(0, 600, 50)])
    assert copies.nearest(others[3:6], others, own=np.arange(3, 6)).min() > 0.1


def test_nothing_to_compare_with_is_an_error() -> None:
    one = np.zeros((1, 16, 16, 3), np.float32)
    with pytest.raises(ValueError, match="1 training pictures are too few"):
        copies.threshold(one, one)


def test_wilson_s_interval() -> None:
    found = copies.rate([0.1] * 3 + [1.0] * 27, limit=0.5)  # 3 of 30
    assert found.share == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.0346, abs=5e-4), pytest.approx(0.2562, abs=5e-4))
    assert copies.rate([1.0] * 10, 0.5).low == pytest.approx(0)


def test_a_stored_thumbnail_becomes_that_of_the_centre_square() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste((0, 0, 255), (100, 0, 200, 100))
    found = copies.squared(look(wide).thumbnail, 300, 100)
    assert np.allclose(found[:, 3:-3], [0, 0, 1], atol=0.1)
    tall = copies.squared(look(wide.rotate(90, expand=True)).thumbnail, 100, 300)
    assert np.allclose(tall[3:-3], [0, 0, 1], atol=0.1)
    square = look(drawings(1, 9)[0]).thumbnail
    assert np.array_equal(copies.squared(square, 128, 128) * 255, np.frombuffer(square, np.uint8).reshape(16, 16, 3))
