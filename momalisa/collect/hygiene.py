"""Bytes that somebody calls a picture -> a clean picture, or the reason why not.

    data -> judge the header -> decode -> sRGB -> matte -> scale -> upright -> PNG or JPEG without metadata

The same bytes and settings give the same bytes. Nothing is decoded before its header was judged: a small file can
claim to be gigabytes.
"""

from __future__ import annotations

import io
import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError

from momalisa.config import Collect

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")
LOSSLESS = {"PNG", "GIF", "BMP", "TIFF"}
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
_opening = threading.Lock()
# What Pillow raises for damaged files, beside its own errors; Warning, for where warnings are errors.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    MemoryError,
    Warning,
)


class BadPicture(ValueError):
    """Why bytes are not a usable picture: the text is what a rejected work's row says."""


@dataclass(frozen=True)
class CleanPicture:
    """RGB as PNG or JPEG, upright, without metadata; sizes in pixels."""

    bytes: bytes
    width: int
    height: int


def clean(data: bytes, settings: Collect) -> CleanPicture:
    """Judge and clean one picture. Raises BadPicture, and nothing else, whatever the bytes."""
    if not data:
        raise BadPicture("the file is empty")
    if is_html(data):
        raise BadPicture("an HTML page, not a picture")
    image = _opened(data)
    lossless = image.format in LOSSLESS
    pixels = image.width * image.height
    if pixels > settings.max_pixels:
        raise BadPicture(f"{image.width}x{image.height} pixels in its header, more than max_pixels={settings.max_pixels}")
    try:
        if image.format == "JPEG":  # a large one is decoded at 1/2, 1/4 or 1/8, never below twice what is wanted
            width, height = fitting(image.size, settings.max_side_px)
            image.draft(None, (2 * width, 2 * height))
        image.load()
        orientation = _orientation(image)
        picture = _rgb(image, settings.matte)
        picture = picture.resize(fitting(picture.size, settings.max_side_px), Image.Resampling.LANCZOS)
    except _DAMAGE as error:
        raise BadPicture(f"truncated or damaged: {_short(error)}") from None
    if orientation in UPRIGHT:
        picture = picture.transpose(UPRIGHT[orientation])
    return CleanPicture(_encoded(picture, lossless and max(picture.size) <= SMALL_PX), *picture.size)


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
        except _DAMAGE as error:
            raise BadPicture(f"unreadable header: {_short(error)}") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where the tag is missing or broken. (Pillow has turned TIFF files already.)"""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except _DAMAGE:
        return 1


def _rgb(image: Image.Image, matte: str) -> Image.Image:
    """Any mode -> RGB in sRGB, transparency over the matte."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    picture = _in_srgb(image, profile) if profile else image
    picture = picture.convert("RGB")
    if alpha is not None:
        ground = Image.new("RGB", picture.size, ImageColor.getrgb(matte))
        ground.paste(picture, mask=alpha)
        picture = ground
    return picture


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey -> L: full scale is 65535, or 1.0 for floats."""
    values: np.ndarray[Any, np.dtype[np.float64]] = np.asarray(image).astype(np.float64)
    scale = 255.0 if image.mode == "F" else 255.0 / 65535.0
    return Image.fromarray(np.clip(np.nan_to_num(values) * scale, 0, 255).round().astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Apply an embedded ICC profile; one that is broken or meant for another mode is passed by."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted or image


def _encoded(picture: Image.Image, lossless: bool) -> bytes:
    picture.info.clear()  # Pillow would write profile and comment again
    sink = io.BytesIO()
    if lossless:
        picture.save(sink, "PNG")
    else:
        picture.save(sink, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return sink.getvalue()
