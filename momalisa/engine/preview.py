"""Rough pictures of latents at the cost of one small product: colours are nearly linear in latents.

rgb = latents W + b for each place, W [C, 3], fitted to the loaded autoencoder by least squares.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from momalisa.latents import Autoencoder, to_pictures

FIT_PICTURES, FIT_PLACES = 16, 16  # so many pictures of 16x16 latent places


class Projection:
    """The linear map from scaled latents to colours."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        """Fits to fields of random colours at four scales, as the autoencoder itself encodes them."""
        pixels = _colour_fields(FIT_PLACES * autoencoder.factor)
        moments = autoencoder.moments(pixels * 2 - 1).float().cpu()
        latents = moments.chunk(2, dim=1)[0] * autoencoder.scaling_factor
        places = latents.permute(0, 2, 3, 1).flatten(0, 2)  # [N, C]
        colours = avg_pool2d(pixels, autoencoder.factor).permute(0, 2, 3, 1).flatten(0, 2)  # [N, 3]
        self.weights = torch.linalg.lstsq(torch.cat([places, torch.ones(len(places), 1)], 1), colours).solution  # [C + 1, 3]

    def pictures(self, latents: Tensor, size_px: int) -> list[Image.Image]:
        """Scaled latents [B, C, h, w] -> RGB pictures of full size."""
        weights = self.weights.to(latents.device)
        colours = torch.einsum("bchw,cd->bdhw", latents, weights[:-1]) + weights[-1].view(-1, 1, 1)
        small = to_pictures(torch.nan_to_num(colours))
        return [picture.resize((size_px, size_px), Image.Resampling.BICUBIC) for picture in small]


def _colour_fields(side: int) -> Tensor:
    """[N, 3, side, side] in 0..1: squares and gradients of random colours."""
    source = torch.Generator().manual_seed(0)
    fields = []
    for number in range(FIT_PICTURES):
        coarse = torch.rand((1, 3, *([2 ** (number // 2 % 4 + 1)] * 2)), generator=source)
        fields.append(interpolate(coarse, size=(side, side), mode="bilinear" if number % 2 else "nearest"))
    return torch.cat(fields)
