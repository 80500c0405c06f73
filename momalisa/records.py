"""What travels between the stages: one noun a stage, and the Arrow schema of its table.

    collect -> caption  -> encode  -> train -> promote -> serve
    Artwork    Captioned   Encoded

A bad picture is a row whose `status` is not `ok` and whose `error` says why; later stages pass it by.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import pyarrow as pa

OK = "ok"
REJECTED = "rejected"


class Reason(StrEnum):
    """What asking for a work's picture ended in: a row's `error` in one word, so that rejects can be counted."""

    OK = "ok"
    NOT_MODIFIED = "not_modified"  # asked again: the picture is what it was (never in a table)
    NO_PICTURE = "no_picture"  # the source names none
    REFUSED = "refused"  # an address that is not asked for: private, or not http(s)
    DISALLOWED = "disallowed"  # by robots.txt, or by X-Robots-Tag
    BLOCKED = "blocked"  # the host answers robots with a challenge page
    NOT_FOUND = "not_found"
    HTTP_ERROR = "http_error"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    TOO_LARGE = "too_large"  # in bytes
    NOT_A_PICTURE = "not_a_picture"  # or a damaged one


@dataclass(frozen=True)
class Artwork:
    """One collected work: its metadata and, if its status is `ok`, its picture as clean RGB PNG or JPEG bytes."""

    id: str  # stable: the source's own identifier where it has one
    status: str = OK
    error: str = ""
    reason: str = ""  # a Reason, once its picture was asked for
    bytes: bytes = b""
    sha256: str = ""  # of the bytes as fetched, before hygiene
    width: int = 0
    height: int = 0
    phash: str = ""  # 16 hex digits: see momalisa.collect.phash
    thumbnail: builtins.bytes = b""  # 16x16 RGB, uint8, row-major: the whole picture squeezed to a square
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


TOLD = ("title", "artist", "date", "medium", "classification", "department", "credit", "rights", "url")  # by a work's source
DETAILS = ("title", "artist", "medium")  # of these, what its fused caption names

ARROW = {"bytes": pa.binary(), "builtins.bytes": pa.binary(), "str": pa.string(), "int": pa.int32()}

IMAGES = pa.schema([pa.field(field.name, ARROW[str(field.type)], nullable=False) for field in fields(Artwork)])

# Of works whose pictures stay: what is told of them now, and where these are. No version names such a table.
CORRECTIONS = pa.schema([IMAGES.field(name) for name in ("id", "status", "error", "reason", *TOLD, "image_url")])

DUPLICATES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("duplicate_of", pa.string(), nullable=False),  # the work that is kept
        pa.field("kind", pa.string(), nullable=False),  # exact: the same file; near: the same work, seen again
        pa.field("distance", pa.int32(), nullable=False),  # bits between the two perceptual hashes
        pa.field("correlation", pa.float32(), nullable=False),  # of the two thumbnails, to four decimals
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

EDITS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),  # with its prefix, as a curator wrote it
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

MIRRORED_LATENTS = LATENTS.append(pa.field("mirrored", pa.binary(), nullable=False))  # as `moments`, of the mirror image
