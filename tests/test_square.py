"""A square holds the very pixels that a model's own processor makes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import BlipImageProcessorPil

from momalisa.miniature import draw
from momalisa.square import Square

PICTURE = draw.draw(draw.all_scenes()[3], seed=1).resize((300, 200))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_squeezed_pixels_are_those_of_transformers(mode: str) -> None:
    picture = PICTURE.convert(mode)
    processor = BlipImageProcessorPil(size={"height": 48, "width": 48}, do_normalize=False, do_rescale=False)
    theirs = processor(images=picture, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(Square(48)(picture), theirs)


def test_the_centre_is_kept_in_proportion() -> None:
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    pixels = Square(50, Image.Resampling.LANCZOS, keep="centre")(picture)
    assert pixels.shape == (50, 50, 3)
    assert (pixels[:, 4:-4] == (0, 0, 255)).all()  # at its edge the filter sees a little beyond the box
    assert pixels.nbytes == Square(50).bytes


def test_it_is_light() -> None:
    code = "import sys, momalisa.square; assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
