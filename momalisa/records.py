"""What travels between the stages: one noun a stage, and the Arrow schema of its table.

    collect -> caption  -> encode  -> train -> promote -> serve
    Artwork    Captioned   Encoded

A bad picture is a row whose `status` is not `ok` and whose `error` says why; later stages pass it by.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

OK = "ok"
REJECTED = "rejected"


@dataclass(frozen=True)
class Artwork:
    """One collected work: its metadata and, if its status is `ok`, its picture as clean RGB PNG or JPEG bytes."""

    id: str  # stable: the source's own identifier where it has one
    status: str = OK
    error: str = ""
    bytes: bytes = b""
    sha256: str = ""  # of the bytes as fetched, before hygiene
    width: int = 0
    height: int = 0
    title: str = ""
    artist: str = ""
    date: str = ""
    medium: str = ""
    classification: str = ""
    department: str = ""
    credit: str = ""
    rights: str = ""
    url: str = ""  # the work's page
    image_url: str = ""  # where the picture came from

    def row(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


IMAGES = pa.schema(
    [
        pa.field(field.name, {"bytes": pa.binary(), "str": pa.string(), "int": pa.int32()}[str(field.type)], nullable=False)
        for field in fields(Artwork)
    ]
)

CAPTIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("short", pa.string(), nullable=False),  # each with its prefix; `encode.caption` says which is trained on
        pa.field("long", pa.string(), nullable=False),  # empty without caption.long_model
        pa.field("fused", pa.string(), nullable=False),  # short, then title, artist and medium, within CLIP's 75 tokens
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)

LATENTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("moments", pa.binary(), nullable=False),  # fp16, little endian [2C, H, W]: mean, log-variance
        pa.field("channels", pa.int32(), nullable=False),  # of a latent (half the moments')
        pa.field("height", pa.int32(), nullable=False),  # in latent places
        pa.field("width", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)
