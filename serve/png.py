"""PNG files that say how they were made: `momalisa.engine.from_parameters` turns what `read` finds into the request again."""

from __future__ import annotations

import io

from PIL import Image, PngImagePlugin


def encode(picture: Image.Image, fields: dict[str, str]) -> bytes:
    """The fields become text chunks."""
    info = PngImagePlugin.PngInfo()
    for name, value in fields.items():
        info.add_itxt(name, value)
    sink = io.BytesIO()
    picture.save(sink, "PNG", pnginfo=info, compress_level=3)
    return sink.getvalue()


def read(data: bytes) -> dict[str, str]:
    """What `encode` was given."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        picture.load()
        return {name: str(value) for name, value in getattr(picture, "text", {}).items()}
