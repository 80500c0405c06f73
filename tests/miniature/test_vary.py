"""Training pictures are varied in every way but the wing's own."""

from __future__ import annotations

import math

import pytest
import torch

from momalisa.miniature import vary
from momalisa.miniature.vary import varied, weathered


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("change", [varied, weathered])
def test_it_keeps_shape_and_range_and_is_a_function_of_the_generator(change: object) -> None:
    pictures = torch.rand(6, 3, 64, 64, generator=seeded(0)) * 2 - 1
    once, again = (change(pictures, seeded(1), 1.0) for _ in range(2))  # type: ignore[operator]
    assert once.shape == pictures.shape
    assert once.abs().max() <= 1
    assert torch.equal(once, again)
    assert not torch.equal(once, pictures)


@pytest.mark.parametrize("change", [varied, weathered])
def test_only_a_share_is_changed(change: object) -> None:
    pictures = torch.zeros(200, 3, 64, 64)
    changed = change(pictures, seeded(2), 0.3)  # type: ignore[operator]
    share = float((changed != 0).flatten(1).any(1).float().mean())
    assert 0.2 < share < 0.4


def test_no_frame_is_like_the_wings_walnut() -> None:
    generator = seeded(3)
    colours = torch.stack([vary._frame_colour(generator) for _ in range(5000)]).flatten(1)
    assert float((colours - vary.WALNUT.flatten()).abs().amax(1).min()) > 0.2
    assert float(colours.amin()) < -0.95
    assert float(colours.amax()) > 0.95


def test_textures_keep_away_from_the_diagonal_of_the_wing() -> None:
    along_the_wing = 0
    for seed in range(200):
        picture = vary._textured(torch.zeros(3, 64, 64), seeded(seed))[0]
        if float(picture.std()) < 0.01:
            continue  # this one was left as it is
        spectrum = torch.fft.rfft2(picture - picture.mean()).abs()
        row, column = divmod(int(spectrum.argmax()), spectrum.shape[1])
        row = row - 64 if row > 32 else row
        angle = math.atan2(row, column) % math.pi
        along_the_wing += abs(angle - vary.WING_DIAGONAL) < vary.KEPT_AWAY / 2
    assert along_the_wing == 0


def test_a_frame_surrounds_the_whole_shrunken_picture() -> None:
    framed = next(
        result
        for seed in range(50)
        if float((result := vary._framed(torch.full((3, 64, 64), 0.123), seeded(seed)))[:, 0, :].mean()) != pytest.approx(0.123)
    )
    assert framed.shape == (3, 64, 64)
    assert torch.equal(framed[:, 0, :], framed[:, -1, :])
    assert float(framed[0, 32, 32]) == pytest.approx(0.123, abs=1e-3)
