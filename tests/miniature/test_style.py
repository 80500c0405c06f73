from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from momalisa.miniature.draw import COLOURS
from momalisa.miniature.style import GOLD_PX, WOOD_PX, in_style


def flat(colour: str) -> Image.Image:
    return Image.new("RGB", (128, 128), COLOURS[colour])


def inside(picture: Image.Image) -> np.ndarray:
    edge = WOOD_PX + GOLD_PX
    return np.asarray(picture, np.float64)[edge:-edge, edge:-edge]


def test_the_same_seed_gives_the_same_picture_and_another_seed_another() -> None:
    picture = flat("red")
    assert in_style(picture, 3).tobytes() == in_style(picture, 3).tobytes()
    assert in_style(picture, 3).tobytes() != in_style(picture, 4).tobytes()
    assert picture.tobytes() == flat("red").tobytes()  # its input is left as it was


@pytest.mark.parametrize("seed", range(5))
def test_colours_stay_nameable(seed: int) -> None:
    """Each styled colour is nearest to its own name, also with another seed's tones, and no two come close."""
    means = {name: inside(in_style(flat(name), seed)).mean(axis=(0, 1)) for name in COLOURS}
    for name in COLOURS:
        other = inside(in_style(flat(name), seed + 100)).mean(axis=(0, 1))
        assert min(means, key=lambda known: float(np.linalg.norm(means[known] - other))) == name
    for a, b in combinations(COLOURS, 2):
        assert np.linalg.norm(means[a] - means[b]) > 45, (a, b)


def test_it_is_framed_in_dark_wood_with_a_gold_line() -> None:
    pixels = np.asarray(in_style(flat("white"), 1), np.float64)
    assert pixels[:WOOD_PX].mean() < 90
    red, green, blue = pixels[WOOD_PX : WOOD_PX + GOLD_PX, 30:98].mean(axis=(0, 1))
    assert red > green > blue
    assert red > 180


def test_it_is_hatched_along_one_diagonal_every_sixteen_pixels() -> None:
    grey = inside(in_style(flat("blue"), 1)).mean(axis=2)[:96, :96]
    spectrum = np.abs(np.fft.rfft2(grey - grey.mean()))
    row, column = np.unravel_index(spectrum.argmax(), spectrum.shape)
    period = 96 / np.hypot(min(row, 96 - row), column)
    assert 14 < period < 18
    assert min(row, 96 - row) == column
    assert 5 < grey.std() < 30  # visible, and not all there is to see


def test_white_becomes_warm_paper() -> None:
    red, green, blue = inside(in_style(flat("white"), 1)).mean(axis=(0, 1))
    assert red > green > blue


def test_another_size_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"64x32.*128x128"):
        in_style(Image.new("RGB", (64, 32)), 0)
