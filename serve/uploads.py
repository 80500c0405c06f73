"""Pictures that visitors send: judged and decoded as collected ones are, then made the square that the engine takes.

A mask is OpenAI's: where it is transparent, the picture is painted again. Without a mask the picture's own transparency
is one. Both are turned upright by their own EXIF orientation first. The engine takes the opposite: white is painted again.
"""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from PIL import Image, ImageOps
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from momalisa.collect.hygiene import UPRIGHT, BadPicture, clean, orientation_of
from momalisa.config import Collect, Serve
from serve.errors import ApiError

MAX_FIELDS = 40
PICTURES = ("image", "image[]")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations whose width is the upright picture's height


@dataclass(frozen=True)
class Form:
    """A multipart body: its texts, its picture, its mask."""

    fields: dict[str, str]
    image: bytes
    mask: bytes | None


async def read_form(content_type: str, body: bytes) -> Form:
    """Raises ApiError (400) for a body that is no such form."""

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    parser = MultiPartParser(Headers({"Content-Type": content_type}), chunks(), max_files=4, max_fields=MAX_FIELDS)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        message = f"the body is not multipart/form-data: {getattr(error, 'message', None) or type(error).__name__}"
        raise ApiError(400, message, code="invalid_multipart") from None
    try:
        texts = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        pictures = [await file.read() for name, file in files if name in PICTURES]
        masks = [await file.read() for name, file in files if name == "mask"]
    finally:
        await form.close()
    if len(pictures) != 1:
        message = f"one picture is edited at a time; {len(pictures)} files named image or image[] came"
        raise ApiError(400, message, "image", "invalid_value" if pictures else "missing_required_parameter")
    if len(masks) > 1:
        raise ApiError(400, f"one mask at most; {len(masks)} came", "mask", "invalid_value")
    return Form(texts, pictures[0], masks[0] if masks else None)


def prepare(form: Form, size_px: int, limits: Serve) -> tuple[bytes, bytes | None]:
    """(image PNG, mask PNG or None), both `size_px` squares: the middle of a picture that is none. Raises ApiError."""
    picture = _cleaned(form.image, "image", size_px, limits)
    mask = _alpha(form.image) if form.mask is None else _mask(form.mask, form.image, size_px, limits)
    return _png(_square(picture, size_px)), None if mask is None else _png(_square(mask, size_px))


def _mask(data: bytes, image: bytes, size_px: int, limits: Serve) -> Image.Image:
    _cleaned(data, "mask", size_px, limits)
    mask = _alpha(data)
    if mask is None:
        raise ApiError(400, "the mask has no transparency: what is transparent is painted again", "mask", "invalid_value")
    width, height = _upright_size(image)
    if mask.size != (width, height):
        shown = f"{mask.width}x{mask.height}, the picture {width}x{height}"
        raise ApiError(400, f"the mask is {shown} (upright): both must have one size", "mask", "invalid_value")
    return mask


def _upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of a picture as people see it. Call it after `_cleaned` has judged the bytes."""
    with Image.open(io.BytesIO(data)) as picture:
        if picture.format == "TIFF":
            picture.load()  # Pillow turns it then, and forgets its orientation
        width, height = picture.size
        return (height, width) if orientation_of(picture) in SIDEWAYS else (width, height)


def _cleaned(data: bytes, name: str, size_px: int, limits: Serve) -> Image.Image:
    """Decoded within limits, RGB, upright. Raises ApiError."""
    rules = Collect(max_pixels=limits.max_upload_pixels, max_side_px=max(1024, 2 * size_px), min_side_px=8)
    try:
        cleaned = clean(data, rules)
    except BadPicture as error:
        raise ApiError(400, f"{name} cannot be used: {error}", name, "invalid_image") from None
    return Image.open(io.BytesIO(cleaned.bytes)).convert("RGB")


def _alpha(data: bytes) -> Image.Image | None:
    """What is to be painted again, white, upright; None where nothing is transparent. Call it after `_cleaned` has judged it."""
    with Image.open(io.BytesIO(data)) as picture:
        if not picture.has_transparency_data:
            return None
        mask = picture.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha < 128 else 0)
        orientation = orientation_of(picture)
    if orientation in UPRIGHT:
        mask = mask.transpose(UPRIGHT[orientation])
    return mask if mask.getbbox() else None


def _square(picture: Image.Image, size_px: int) -> Image.Image:
    kind = Image.Resampling.NEAREST if picture.mode == "L" else Image.Resampling.LANCZOS
    return ImageOps.fit(picture, (size_px, size_px), kind)


def _png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG", compress_level=1)
    return sink.getvalue()
