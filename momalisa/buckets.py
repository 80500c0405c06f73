"""Aspect-ratio buckets: a few picture sizes of about equal area, so that no picture's centre is cut out of it.

Light imports: processes that only decode load no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_RATIO = 4.0  # longer pictures lose their ends
Size = tuple[int, int]  # width, height in pixels


@lru_cache(maxsize=32)
def buckets(resolution_px: int, step_px: int) -> tuple[Size, ...]:
    """The square, and sizes whose sides are multiples of `step_px` and whose area is as near to the square's as can be.

    With a size comes its transpose; none is more than MAX_RATIO times as long as it is wide. 512, 64: 17 sizes from
    1024x256 to 256x1024.
    """
    found, area = {(resolution_px, resolution_px)}, resolution_px**2
    for width in range(step_px, int(resolution_px * MAX_RATIO) + 1, step_px):
        height = max(1, round(area / width / step_px)) * step_px
        if max(width, height) <= MAX_RATIO * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def nearest(width: int, height: int, resolution_px: int, step_px: int) -> Size:
    """The bucket of a picture: the nearest in proportions; of equally near ones the one nearest in area to the square."""
    if height > width:
        high, wide = nearest(height, width, resolution_px, step_px)
        return wide, high
    wanted, area = math.log(width / height), resolution_px**2
    return min(
        buckets(resolution_px, step_px),
        key=lambda size: (abs(math.log(size[0] / size[1]) - wanted), abs(math.log(size[0] * size[1] / area)), -size[0]),
    )


@dataclass(frozen=True)
class Bucketed:
    """A picture at the size of its bucket: scaled to cover it, and the little that sticks out cut off on both sides alike."""

    size_px: int
    step_px: int
    resample: int = Image.Resampling.LANCZOS

    def __call__(self, picture: Image.Image) -> NDArray[np.uint8]:
        """A picture of any mode -> [H, W, 3] RGB. A square one becomes what `Square` makes of it."""
        width, height = picture.size
        size = nearest(width, height, self.size_px, self.step_px)
        scale = max(size[0] / width, size[1] / height)
        left, top = (width - size[0] / scale) / 2, (height - size[1] / scale) / 2
        box = (max(left, 0.0), max(top, 0.0), min(width - left, width), min(height - top, height))
        return np.asarray(picture.convert("RGB").resize(size, Image.Resampling(self.resample), box=box))
