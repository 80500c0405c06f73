"""A picture -> a square of uint8 pixels, as a model takes it. Light imports: processes that only decode load no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Square:
    """How a model wants its pictures: the whole one squeezed to a square, or the centre of one in its own proportions."""

    size_px: int
    resample: int = Image.Resampling.BICUBIC
    keep: Literal["all", "centre"] = "all"

    def __call__(self, picture: Image.Image) -> NDArray[np.uint8]:
        """A picture of any mode -> [S, S, 3] RGB."""
        width, height = picture.size
        box = (0.0, 0.0, float(width), float(height))
        if self.keep == "centre":
            short = min(width, height)
            left, top = (width - short) / 2, (height - short) / 2
            box = (left, top, left + short, top + short)
        size = (self.size_px, self.size_px)
        return np.asarray(picture.convert("RGB").resize(size, Image.Resampling(self.resample), box=box))
