"""Photographs of pictures are not drawings: training pictures varied in light, palette, texture and frame.

BLIP and the VAE learn from these so that they can read and keep pictures in styles that they never met. The
ranges are wide; what makes the wing (`style.py`) is left out of them: no frame is walnut, and no texture runs along the
wing's diagonal.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from momalisa.miniature import style

WIDEST_FRAME_PX = 18
WING_DIAGONAL = math.pi / 4  # where the wing's hatching runs from line to line; textures keep away from it
KEPT_AWAY = math.pi / 8
WALNUT = torch.tensor(style.WALNUT).view(3, 1, 1) / 127.5 - 1
UNLIKE = 0.25  # the largest difference of a channel, of 2


def varied(pictures: torch.Tensor, generator: torch.Generator, share: float = 0.5) -> torch.Tensor:
    """Vary a share of pictures [B, 3, H, W] float32 in -1..1; the others come back as they are."""
    changed = [_framed(_textured(_repainted(picture, generator), generator), generator) for picture in pictures]
    count = len(pictures)
    grain = 0.10 * _uniform(generator, count, 1, 1, 1) * torch.randn(pictures.shape, generator=generator)
    chosen = _uniform(generator, count, 1, 1, 1) < share
    return torch.where(chosen, (torch.stack(changed) + grain).clamp(-1, 1), pictures)


def weathered(pictures: torch.Tensor, generator: torch.Generator, share: float = 0.5) -> torch.Tensor:
    """Vary light, tint and grain only, in a share of pictures [B, 3, H, W] float32 in -1..1."""
    count = len(pictures)
    gain = 1 + 0.35 * (_uniform(generator, count, 1, 1, 1) - 0.5)
    tint = 0.30 * (_uniform(generator, count, 3, 1, 1) - 0.5)
    grain = 0.10 * _uniform(generator, count, 1, 1, 1) * torch.randn(pictures.shape, generator=generator)
    chosen = _uniform(generator, count, 1, 1, 1) < share
    return torch.where(chosen, (pictures * gain + tint + grain).clamp(-1, 1), pictures)


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator)


def _chance(generator: torch.Generator, share: float) -> bool:
    return bool(_uniform(generator, 1) < share)


def _colour(generator: torch.Generator) -> torch.Tensor:
    """A colour [3, 1, 1] in -1..1, any."""
    return 2 * _uniform(generator, 3, 1, 1) - 1


def _frame_colour(generator: torch.Generator) -> torch.Tensor:
    """A colour [3, 1, 1] in -1..1, any that is not like the wing's walnut."""
    while True:
        colour = _colour(generator)
        if (colour - WALNUT).abs().max() > UNLIKE:
            return colour


def _repainted(picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Contrast, tint, and often a common paper in every colour and less of each. [3, H, W]"""
    gain = 1 + 0.35 * (_uniform(generator, 1) - 0.5)
    tint = 0.30 * (_uniform(generator, 3, 1, 1) - 0.5)
    picture = picture * gain + tint
    if _chance(generator, 0.6):
        fade, grey = 0.35 * _uniform(generator, 1), picture.mean(0, keepdim=True)
        picture = (picture + 0.3 * _uniform(generator, 1) * (grey - picture)) * (1 - fade) + fade * _colour(generator)
    return picture


def _textured(picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Waves of light over half of the pictures, one way or across each other. [3, H, W]"""
    if not _chance(generator, 0.5):
        return picture
    y, x = (torch.arange(side, dtype=torch.float32) for side in picture.shape[1:])
    for _ in range(1 + _chance(generator, 0.3)):
        # an angle anywhere but near the wing's diagonal; directions repeat after half a turn
        angle = WING_DIAGONAL + KEPT_AWAY + float(_uniform(generator, 1)) * (math.pi - 2 * KEPT_AWAY)
        period_px = 6 + 26 * float(_uniform(generator, 1))
        phase = math.tau * float(_uniform(generator, 1))
        along = x[None, :] * math.cos(angle) + y[:, None] * math.sin(angle)
        wave = torch.sin(along * (math.tau / period_px) + phase)
        picture = (picture + 1) * (1 + 0.2 * float(_uniform(generator, 1)) * wave) - 1
    return picture


def _framed(picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shrunk into a frame of one colour, often with a line of another inside it, for 60% of pictures. [3, H, W]"""
    if not _chance(generator, 0.6):
        return picture
    frame, line = _frame_colour(generator), _colour(generator)
    width_px = 2 + int(float(_uniform(generator, 1)) * (WIDEST_FRAME_PX - 2))
    line_px = int(float(_uniform(generator, 1)) * min(6, width_px))
    height, width = picture.shape[1:]
    size = (height - 2 * width_px, width - 2 * width_px)
    inside = F.interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    inside = F.pad(inside, (line_px,) * 4)
    outer = width_px - line_px
    mask = F.pad(torch.ones(1, *size), (line_px,) * 4)
    within = torch.where(mask > 0, inside, line.expand_as(inside))
    framed = frame.expand_as(picture).clone()
    framed[:, outer : height - outer, outer : width - outer] = within
    return framed
