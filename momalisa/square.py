"""A picture -> a square of uint8 pixels, as a model takes it. Light imports: torch only where a picture is squeezed.

A picture that is squeezed smaller is, bit for bit, that of transformers' own default processor (`BlipImageProcessor`, which
asks torchvision, which asks torch), and Pillow's bicubic one (`BlipImageProcessorPil`) up to rounding: of 109 paintings
one of 255 levels in 107, and 7 at most. The two keep the filter's weights in whole numbers of other sizes (16 bits here, 22
there), so they round apart. Torch takes a fifth of the time: wider instructions, on bytes that are read where Pillow has
decoded them. (A picture that is enlarged is filtered in another order there, so that is left to Pillow.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Square:
    """How a model wants its pictures: the whole one squeezed to a square, or the centre of one in its own proportions."""

    size_px: int
    resample: int = Image.Resampling.BICUBIC
    keep: Literal["all", "centre"] = "all"

    def __call__(self, picture: Image.Image) -> NDArray[np.uint8]:
        """A picture of any mode -> [S, S, 3] RGB, to be read only."""
        width, height = picture.size
        if self.keep == "all" and self.resample == Image.Resampling.BICUBIC and min(width, height) >= self.size_px:
            return _squeezed(picture if picture.mode == "RGB" else picture.convert("RGB"), self.size_px)
        box = (0.0, 0.0, float(width), float(height))
        if self.keep == "centre":
            short = min(width, height)
            left, top = (width - short) / 2, (height - short) / 2
            box = (left, top, left + short, top + short)
        size = (self.size_px, self.size_px)
        return np.asarray(picture.convert("RGB").resize(size, Image.Resampling(self.resample), box=box))


def _squeezed(picture: Image.Image, size_px: int) -> NDArray[np.uint8]:
    """RGB, no side smaller than S -> [S, S, 3], bicubic and antialiased."""
    from torch.nn.functional import interpolate

    size = (size_px, size_px)
    if picture.size == size:
        return np.asarray(picture)
    pixels = interpolate(_channels_last(picture), size, mode="bicubic", antialias=True, align_corners=False)
    made: NDArray[np.uint8] = pixels[0].permute(1, 2, 0).numpy()
    if made.shape[2] == 4:  # Pillow leaves the fourth bytes out in a third of torch's time
        packed = Image.frombuffer("RGBX", size, made, "raw", "RGBX", 0, 1).tobytes("raw", "RGB")
        made = np.frombuffer(packed, np.uint8).reshape(*size, 3)
    return made


def _channels_last(picture: Image.Image) -> Tensor:
    """An RGB picture -> [1, 3 or 4, H, W] uint8 in channels_last, to be read only.

    Pillow keeps RGB in four bytes a place, and lends them without a copy where they lie in one piece (up to 16 MiB).
    """
    import pyarrow as pa
    import torch
    from torch.utils.dlpack import from_dlpack

    picture.load()
    try:
        lent = from_dlpack(pa.array(picture).flatten()).view(picture.height, picture.width, 4)
    except ValueError:
        lent = torch.from_numpy(np.array(picture))
    return lent[None].permute(0, 3, 1, 2)  # in this order: else torch takes it for planes, and makes such
