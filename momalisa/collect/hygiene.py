"""Bytes that somebody calls a picture -> a clean picture, or the reason why not.

    data -> judge the header -> decode -> scale -> sRGB -> matte -> upright -> PNG or JPEG without metadata
                             -> a JPEG that needs nothing of this: its own segments, without metadata

A JPEG that is small enough, upright, and RGB in sRGB loses nothing to being encoded again: its pixels pass as they are.
It is decoded at a fraction of its size, which reads every one of its bits, so that a damaged one is still found.

The same bytes and settings give the same bytes. Nothing is decoded before its header was judged: a small file can
claim to be gigabytes. Whatever is done at full size is done strip by strip or by Pillow in place; large pictures are
decoded one at a time, however many threads there are, so memory stays bounded.
"""

from __future__ import annotations

import io
import re
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError

from momalisa.collect import jpeg
from momalisa.collect.phash import LEAST_PX, look
from momalisa.config import Collect

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")
LOSSLESS = {"PNG", "GIF", "BMP", "TIFF"}
SAME_LEVELS = 2  # of 255: colours that differ by no more are the same
SMALL_PX = 256  # lossless pictures up to this side stay lossless
JPEG_QUALITY = 95
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
JPEGS = {"JPEG", "MPO"}  # MPO: a JPEG with another view or a preview behind it
LARGE_PIXELS = 16_000_000  # more than this, once decoded, and pictures wait for each other
REDUCING_GAP = 3.0  # scale by whole factors first, as long as three times what is wanted remains: several times faster
STRIP = 1 << 20  # values that are brought to eight bits at a time
_opening, _large = threading.Lock(), threading.Lock()


class BadPicture(ValueError):
    """Why bytes are not a usable picture: the text is what a rejected work's row says."""


@dataclass(frozen=True)
class CleanPicture:
    """RGB as PNG or JPEG, upright, without metadata; sizes in pixels; how it looks (see `phash`)."""

    bytes: bytes
    width: int
    height: int
    phash: str
    thumbnail: Any  # bytes, as the field above has taken the name


def clean(data: bytes, settings: Collect) -> CleanPicture:
    """Judge and clean one picture. Raises BadPicture, and nothing else, whatever the bytes."""
    if not data:
        raise BadPicture("the file is empty")
    if is_html(data):
        raise BadPicture("an HTML page, not a picture")
    try:
        image = _opened(data)
        _judge(image, settings)
        return _as_it_is(data, image, settings) or _cleaned(image, settings)
    except BadPicture:
        raise
    except Exception as error:  # Pillow promises no kinds: damaged files raise OSError, SyntaxError, TypeError, ValueError, ...
        raise BadPicture(f"truncated or damaged: {_short(error)}") from None


def _as_it_is(data: bytes, image: Image.Image, settings: Collect) -> CleanPicture | None:
    """A JPEG that needs no mending, with its own coded pixels; None: it has to be encoded again."""
    if image.format not in JPEGS or image.mode != "RGB" or max(image.size) > settings.max_side_px:
        return None
    if orientation_of(image) in UPRIGHT or not _is_srgb(image.info.get("icc_profile")):
        return None
    file = jpeg.bare(data)
    if file is None:
        return None
    size, stored = image.size, image if file is data else _opened(file)
    stored.draft(None, (LEAST_PX, LEAST_PX))
    return CleanPicture(file, *size, *look(stored))  # decodes it, and so finds what is damaged


def _cleaned(image: Image.Image, settings: Collect) -> CleanPicture:
    lossless = image.format in LOSSLESS
    if image.format in JPEGS:  # a large one is decoded at 1/2, 1/4 or 1/8, never below twice what is wanted
        width, height = fitting(image.size, settings.max_side_px)
        image.draft(None, (2 * width, 2 * height))
    with _large if image.width * image.height > LARGE_PIXELS else nullcontext():
        image.load()
        orientation, profile = orientation_of(image), image.info.get("icc_profile")
        image = _scalable(image)
        scaled = image.resize(fitting(image.size, settings.max_side_px), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    picture = _rgb(scaled, profile, settings.matte)
    if orientation in UPRIGHT:
        picture = picture.transpose(UPRIGHT[orientation])
    return CleanPicture(_encoded(picture, lossless and max(picture.size) <= SMALL_PX), *picture.size, *look(picture))


def _judge(image: Image.Image, settings: Collect) -> None:
    """Judge by the header alone. Raises BadPicture."""
    size = f"{image.width}x{image.height} pixels in its header"
    if image.width * image.height > settings.max_pixels:
        raise BadPicture(f"{size}, more than max_pixels={settings.max_pixels}")
    if min(image.size) < settings.min_side_px:
        raise BadPicture(f"{size}, less than min_side_px={settings.min_side_px}")
    if settings.animated == "reject" and image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadPicture(f"an animation or several pages ({image.format}), and animated=reject")


def is_html(data: bytes) -> bool:
    """Whether bytes begin like a web page."""
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def fitting(size: tuple[int, int], max_side_px: int) -> tuple[int, int]:
    """The size with the same proportions whose long side is at most `max_side_px`; never larger than it was."""
    scale = min(1.0, max_side_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _opened(data: bytes) -> Image.Image:
    """Read the header. Pillow's own limit warns or raises by a global: ours, from the settings, comes right after."""
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise BadPicture(f"not a picture in a known format ({', '.join(FORMATS)})") from None
        except Exception as error:  # see `clean`
            raise BadPicture(f"unreadable header: {_short(error)}") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _short(error: BaseException) -> str:
    """An error's text in one line, without memory addresses: the same file always gives the same row."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
    return " ".join(text.split())[:160] or type(error).__name__


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where the tag is missing or broken. (Pillow has turned TIFF files already.)"""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # see `clean`: of broken EXIF blocks SyntaxError and ValueError are common, and TIFF's reader has more
        return 1


def _scalable(image: Image.Image) -> Image.Image:
    """Any mode -> one whose scaled values mean something: L, LA, RGB, RGBA, CMYK or LAB."""
    if image.mode.startswith(("I", "F")):
        return _eight_bit(image)
    if image.mode == "LA" or (image.mode == "L" and "transparency" in image.info):
        return image.convert("LA")
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")


def _rgb(image: Image.Image, profile: bytes | None, matte: str) -> Image.Image:
    """A scalable mode -> RGB in sRGB, transparency over the matte."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha is not None:
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode == "LAB":
        image = _in_srgb(image, None)
    elif profile:
        image = _in_srgb(image, profile)
    picture = image.convert("RGB")
    if alpha is not None:
        ground = Image.new("RGB", picture.size, ImageColor.getrgb(matte))
        ground.paste(picture, mask=alpha)
        picture = ground
    return picture


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey -> L, or LA with a transparent value: full scale is 65535, or 1.0 for floats."""
    scale = 255.0 if image.mode == "F" else 255.0 / 65535.0
    transparent = image.info.get("transparency")
    values = np.asarray(image)
    grey, alpha = np.empty(values.shape, np.uint8), None if transparent is None else np.empty(values.shape, np.uint8)
    rows = max(1, STRIP // values.shape[1])
    for start in range(0, len(values), rows):
        strip: npt.NDArray[np.float64] = values[start : start + rows].astype(np.float64)
        grey[start : start + rows] = np.clip(np.nan_to_num(strip) * scale, 0, 255).round()
        if alpha is not None:
            alpha[start : start + rows] = np.where(strip == transparent, 0, 255)
    made = Image.fromarray(grey)
    return made if alpha is None else Image.merge("LA", (made, Image.fromarray(alpha)))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Apply an embedded ICC profile (None: CIELAB's own); one that is broken or meant for another mode is passed by."""
    try:
        converted: Image.Image = _transform(profile, image.mode).apply(image)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return converted


@lru_cache(maxsize=16)
def _is_srgb(profile: bytes | None) -> bool:
    """Whether an RGB picture with this profile looks the same without it."""
    if not profile:
        return True
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    seen = np.asarray(_in_srgb(Image.fromarray(colours), profile))
    return int(np.abs(seen.astype(np.int16) - colours).max()) <= SAME_LEVELS


@lru_cache(maxsize=16)  # a museum's pictures share a few profiles, and a transform takes longer to build than to apply
def _transform(profile: bytes | None, mode: str) -> Any:
    source = ImageCms.createProfile("LAB") if profile is None else ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _encoded(picture: Image.Image, lossless: bool) -> bytes:
    picture.info.clear()  # Pillow would write profile and comment again
    sink = io.BytesIO()
    if lossless:
        picture.save(sink, "PNG")
    else:
        picture.save(sink, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return sink.getvalue()
