"""Fill a column family of the dataset: works of an images table -> uint8 pixels -> a model's rows -> a table.

The unit is a part: the works of one images table that still lack a row. It travels as bytes and JSON between

    decode (a CPU: pictures -> uint8 pixels) -> model (an accelerator: pixels -> rows)

A batch holds works of one shape; a part's batches and its table are the same wherever either of the two is done.
"""

from __future__ import annotations

import io
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from momalisa.buckets import Bucketed
from momalisa.config import Caption, Encode
from momalisa.records import OK
from momalisa.square import Square
from momalisa.storage import parquet_bytes

ERROR = "error"
PART_WORKS = 512  # at most: its pixels are one Arrow value, and those end at 2 GiB

Work = dict[str, str]  # id, text, and the family's columns of the images table
Pixels = NDArray[np.uint8]  # [B, H, W, 3]
Frame = Square | Bucketed  # how a model wants its pictures


class Model(ABC):
    """What an actor holds: a model that turns pictures into rows of a family."""

    @abstractmethod
    def rows(self, works: list[Work], pixels: list[Pixels]) -> list[dict[str, Any]]:
        """One batch, with its pixels for each of the family's squares -> one row each, in order."""

    @abstractmethod
    def failed(self, work: Work, error: str) -> dict[str, Any]:
        """The row of a work that came to nothing."""


@dataclass(frozen=True)
class Family:
    """A column family to fill: its stage, settings, folder, schema, what it reads, and how an actor makes its model."""

    stage: str
    settings: Caption | Encode
    folder: str
    schema: pa.Schema
    squares: tuple[Frame, ...]
    load: Callable[[str], Model]  # a device -> a model
    columns: tuple[str, ...] = ()  # of the images table, for the rows

    @property
    def device(self) -> str:
        return "cuda" if self.settings.gpus_per_actor else "cpu"


def open_picture(data: bytes) -> Image.Image:
    """Bytes -> a picture. Errors carry no memory address, so the same bad picture gives the same row."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(f"{len(data)} bytes that are no picture in a known format") from None


def split(part: dict[str, str]) -> Iterator[dict[str, str]]:
    """A part -> parts of at most PART_WORKS works."""
    wanted = list(json.loads(part["wanted"]).items())
    for start in range(0, len(wanted), PART_WORKS):
        yield {**part, "wanted": json.dumps(dict(wanted[start : start + PART_WORKS]))}


def decode(part: dict[str, Any], squares: tuple[Frame, ...], columns: tuple[str, ...]) -> dict[str, Any]:
    """A part with its table's bytes -> its works in order of shape and id, those without a picture, and the others' pixels.

    Pixels are uint8: all works' first squares, then all their second ones; `shapes` has [height, width] of each.
    """
    began, wanted = time.monotonic(), json.loads(part["wanted"])
    names = ["id", "bytes", *columns]
    table = pq.read_table(io.BytesIO(part["data"]), columns=names, filters=[("id", "in", list(wanted))])
    found = sorted({row["id"]: row for row in table.to_pylist()}.values(), key=lambda row: str(row["id"]))
    made, failed = [], []
    for row in found:
        data, work = row.pop("bytes"), {**row, "text": wanted[row["id"]]}
        try:
            picture = open_picture(data)
            arrays = [square(picture) for square in squares]
            made.append(([list(array.shape[:2]) for array in arrays], work, [array.tobytes() for array in arrays]))
        except Exception as error:
            failed.append([work, f"{type(error).__name__}: {error}"])
    made.sort(key=lambda item: item[0])  # stable: by id within a shape
    return {
        "works": json.dumps([work for _, work, _ in made]),
        "shapes": json.dumps([shapes for shapes, _, _ in made]),
        "failed": json.dumps(failed),
        "pixels": b"".join(data[number] for number in range(len(squares)) for _, _, data in made),
        "decode_s": time.monotonic() - began,
    }


def unpack(data: bytes, shapes: list[list[list[int]]]) -> list[list[Pixels]]:
    """The pixels of a decoded part: for each of the family's squares, an array [H, W, 3] for each work."""
    start, found = 0, []
    for column in zip(*shapes, strict=True):
        arrays = []
        for height, width in column:
            flat = np.frombuffer(data, dtype=np.uint8, count=height * width * 3, offset=start)
            arrays.append(flat.reshape(height, width, 3))
            start += flat.size
        found.append(arrays)
    return found


def batches(shapes: list[list[list[int]]], most: int) -> Iterator[tuple[int, int]]:
    """Runs start..end-1 of works of equal shapes, `most` at a time."""
    place = 0
    for _, group in itertools.groupby(shapes):
        end = place + len(list(group))
        yield from ((start, min(start + most, end)) for start in range(place, end, most))
        place = end


def fill(part: dict[str, Any], family: Family, model: Model) -> dict[str, Any]:
    """A decoded part -> its table's bytes, and how many rows are good and bad."""
    began, works, shapes = time.monotonic(), json.loads(part["works"]), json.loads(part["shapes"])
    pixels = unpack(part["pixels"], shapes)
    rows = [model.failed(work, error) for work, error in json.loads(part["failed"])]
    for start, end in batches(shapes, family.settings.batch):
        rows += model.rows(works[start:end], [np.stack(arrays[start:end]) for arrays in pixels])
    rows.sort(key=lambda row: str(row["id"]))
    bad = sum(row["status"] != OK for row in rows)
    table = parquet_bytes(pa.Table.from_pylist(rows, schema=family.schema))
    return {"data": table, "ok": len(rows) - bad, "bad": bad, "decode_s": part["decode_s"], "model_s": time.monotonic() - began}
