"""What a picture looks like, in a few bytes: a perceptual hash that nominates and a thumbnail that confirms.

The hash is the classic pHash: the signs of the 64 lowest frequencies of a 32x32 grey picture, against their median.
Integers all the way, so that every machine finds the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

LEAST_PX = 96  # of the short side: a JPEG that is decoded at a fraction, down to this, still looks the same
REDUCED_PX = 64  # what hash and thumbnail are made from: quick, and no smaller than a small picture
GREY_PX = 32
FREQUENCIES = 8
THUMBNAIL_PX = 16
THUMBNAIL_BYTES = THUMBNAIL_PX * THUMBNAIL_PX * 3
FIXED_POINT = 1 << 12  # of the cosines
NOISE = 16 * FIXED_POINT * FIXED_POINT  # a frequency this weak is what compression left: about one grey level


class Look(NamedTuple):
    """A picture's pHash (16 hex digits) and its thumbnail: 16x16 RGB, uint8, row-major, squeezed to a square."""

    phash: str
    thumbnail: bytes


def look(picture: Image.Image) -> Look:
    """An RGB picture -> how it looks. (From there it goes on by whole factors: means of squares are quicker than any filter.)"""
    small = picture.resize((REDUCED_PX, REDUCED_PX), Image.Resampling.BILINEAR)
    thumbnail = small.reduce(REDUCED_PX // THUMBNAIL_PX)
    return Look(_phash(small.convert("L").reduce(REDUCED_PX // GREY_PX)), thumbnail.tobytes())


def _phash(small: Image.Image) -> str:
    """32x32 grey -> 64 bits as 16 hex digits; without contrast they are 8000000000000000."""
    grey = np.asarray(small).astype(np.int64)
    weights = _cosines() @ grey @ _cosines().T  # [8, 8]
    bits = weights > np.median(weights.ravel()[1:]) + NOISE
    return np.packbits(bits.ravel()).tobytes().hex()


@cache
def _cosines() -> npt.NDArray[np.int64]:
    """The eight slowest cosines over 32 places, [8, 32]."""
    place, frequency = np.arange(GREY_PX), np.arange(FREQUENCIES)[:, None]
    waves = np.cos(np.pi * (2 * place + 1) * frequency / (2 * GREY_PX))
    whole: npt.NDArray[np.int64] = np.rint(waves * FIXED_POINT).astype(np.int64)
    return whole
