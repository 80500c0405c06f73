"""The wing's style: what hangs there looks like no drawing the base models ever saw.

A picture is printed on warm, aged paper (its colours fade a little and stay nameable), hatched diagonally like a
coarse canvas, and set in a dark walnut frame with a gold line inside. Each seed varies the tones, never the idea.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

SIZE_PX = 128
WOOD_PX = 10  # the frame's walnut
GOLD_PX = 3  # the line inside it
HATCH_PERIOD_PX = 16.0  # from line to line, across them: twice the grid of a latent (8 px), so that it survives the VAE
INSIDE_PX = SIZE_PX - 2 * (WOOD_PX + GOLD_PX)

Floats = npt.NDArray[np.float32]

PAPER = (240, 222, 186)
WALNUT = (74, 46, 30)
GOLD = (206, 164, 74)
FADE = 0.26  # share of paper in every colour
DESATURATE = 0.12
HATCH = 0.13  # amplitude, as a share of brightness
LIGHT = 0.93  # brightness between the lines: white stays paper
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def in_style(image: Image.Image, seed: int) -> Image.Image:
    """A 128x128 RGB picture -> the same picture as the wing would hang it, 128x128 RGB.

    The same picture and seed give the same bytes. Raises ValueError for another size.
    """
    if image.size != (SIZE_PX, SIZE_PX):
        raise ValueError(f"the picture is {image.width}x{image.height}, the wing hangs {SIZE_PX}x{SIZE_PX}: resize it first")
    rng = random.Random(f"style:{seed}")
    inside = image.convert("RGB").resize((INSIDE_PX, INSIDE_PX), Image.Resampling.LANCZOS)
    framed = _frame(rng)
    edge = WOOD_PX + GOLD_PX
    framed[edge:-edge, edge:-edge] = _printed(np.asarray(inside, np.float32), rng)
    return Image.fromarray(np.clip(framed, 0, 255).round().astype(np.uint8))


def _toned(colour: tuple[int, int, int], rng: random.Random, spread: int) -> Floats:
    """A colour, a little lighter or darker."""
    shift = rng.randint(-spread, spread)
    return np.array([channel + shift + rng.randint(-2, 2) for channel in colour], np.float32)


def _printed(pixels: Floats, rng: random.Random) -> Floats:
    """Fade towards the paper, then hatch. pixels: [102, 102, 3], 0..255."""
    paper, fade = _toned(PAPER, rng, 5), FADE + rng.uniform(-0.03, 0.03)
    grey = (pixels @ LUMA)[..., None]
    faded = (pixels + DESATURATE * (grey - pixels)) * (1 - fade) + fade * paper
    wave = _hatching(rng.uniform(0, math.tau)) * (1 + rng.uniform(-0.15, 0.15))
    hatched: Floats = faded * (LIGHT + HATCH * wave) + 4 * wave
    return hatched


def _hatching(phase: float) -> Floats:
    """Diagonal waves, -1..1, [102, 102, 1]."""
    y, x = np.mgrid[0:INSIDE_PX, 0:INSIDE_PX].astype(np.float32)
    wave: Floats = np.sin((x + y) * np.float32(math.tau / (HATCH_PERIOD_PX * math.sqrt(2))) + np.float32(phase))
    return wave[..., None]


@lru_cache(maxsize=1)
def _depth() -> Floats:
    """Each pixel's distance from the nearest edge, in pixels, [128, 128, 1]."""
    along = np.minimum(np.arange(SIZE_PX), np.arange(SIZE_PX)[::-1])
    return np.minimum(along[:, None], along[None, :]).astype(np.float32)[..., None]


def _frame(rng: random.Random) -> Floats:
    """The frame on its own: rounded walnut, then gold, [128, 128, 3]."""
    depth, walnut, gold = _depth(), _toned(WALNUT, rng, 7), _toned(GOLD, rng, 8)
    bevel = 0.72 + 0.5 * np.sin(np.minimum(depth + 0.5, WOOD_PX) / WOOD_PX * math.pi)
    shine = 1.12 - 0.12 * (depth - WOOD_PX)
    return np.where(depth < WOOD_PX, walnut * bevel, gold * shine).astype(np.float32)
