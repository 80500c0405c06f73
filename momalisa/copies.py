"""Has a model learned its training pictures by heart? How near what it draws comes to the nearest of them.

The distance is the root mean square difference of two pictures' 16x16 colour thumbnails, those that tell duplicates in a
collection (`collect.phash`), with either of them mirrored too. What is too near is learned from the collection itself:
a picture nobody copied is as near to the nearest training picture as a held-out work is, or a training picture to the
nearest *other* one. The threshold is the distance that only one in a hundred of these falls below (a calibrated form of
the nearest-neighbour rule of Carlini et al. 2023, "Extracting Training Data from Diffusion Models", section 4; held-out
pictures as the yardstick are those of Meehan et al. 2020, "A Non-Parametric Test to Detect Data-Copying").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from momalisa.collect.phash import THUMBNAIL_PX, look

QUANTILE = 0.01
ROWS = 256  # compared at once
SAMPLE = 2000  # pictures of each half that the threshold is learned from, at most


def features(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Thumbnails [N, 16, 16, 3] float32 in 0..1."""
    flat = [np.frombuffer(look(picture.convert("RGB")).thumbnail, np.uint8) for picture in pictures]
    values: np.ndarray = np.stack(flat).reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX, 3).astype(np.float32) / 255
    return values


def squared(thumbnail: bytes, width: int, height: int) -> np.ndarray:
    """A collection's stored thumbnail, a whole picture of this size squeezed -> that of its centre square [16, 16, 3] in 0..1."""
    picture = Image.frombytes("RGB", (THUMBNAIL_PX, THUMBNAIL_PX), thumbnail)
    x, y = (THUMBNAIL_PX * (1 - min(width, height) / side) / 2 for side in (width, height))
    box = (x, y, THUMBNAIL_PX - x, THUMBNAIL_PX - y)
    cut = picture.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR, box=box) if x or y else picture
    values: np.ndarray = np.asarray(cut, np.float32) / 255
    return values


def nearest(these: np.ndarray, others: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """The distance of each of `these` to the nearest of `others`, mirrored or not: [N] float64. `own`: the place of each among
    the others, where it is not compared with itself. Raises ValueError where there is nothing to compare with."""
    if len(others) < (1 if own is None else 2):
        raise ValueError(f"{len(others)} training pictures are too few to compare with")
    flat, found = others.reshape(len(others), -1), np.full(len(these), np.inf)
    for start in range(0, len(these), ROWS):
        part = these[start : start + ROWS]
        for way in (part, part[:, :, ::-1]):
            squares = _squares(way.reshape(len(part), -1), flat)
            if own is not None:
                squares[np.arange(len(part)), own[start : start + ROWS]] = np.inf
            found[start : start + ROWS] = np.minimum(found[start : start + ROWS], squares.min(1))
    distances: np.ndarray = np.sqrt(found / flat.shape[1])
    return distances


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares: np.ndarray = ((x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2 * x @ y.T).clip(min=0)
    return squares


def threshold(training: np.ndarray, held_out: np.ndarray) -> float:
    """The distance below which a picture counts as a copy, from thumbnails of both halves of a collection."""
    some = np.linspace(0, len(training) - 1, min(len(training), SAMPLE)).round().astype(int)
    innocent = np.concatenate([nearest(training[some], training, own=some), nearest(held_out[:SAMPLE], training)])
    return float(np.quantile(innocent, QUANTILE))


@dataclass(frozen=True)
class CopyRate:
    """The share of pictures that are copies, and Wilson's 95% interval of it."""

    share: float
    low: float
    high: float


def rate(distances: Sequence[float], limit: float) -> CopyRate:
    """Of generated pictures, by their distances to the nearest training picture. (Wilson 1927)"""
    n, z = len(distances), 1.959963984540054
    share = sum(distance < limit for distance in distances) / n
    centre, spread = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return CopyRate(share, float((centre - spread) / scale), float((centre + spread) / scale))
