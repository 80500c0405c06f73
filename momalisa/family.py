"""Fill a column family of the dataset: works of an images table -> squares of pixels -> a model's rows -> a table.

The unit is a part: the works of one images table that still lack a row. It travels as bytes and JSON between

    decode (a CPU: pictures -> uint8 squares) -> model (an accelerator: squares -> rows)

and its batches and its table are the same wherever either of the two is done.
"""

from __future__ import annotations

import io
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

from momalisa.config import Caption, Encode
from momalisa.records import OK
from momalisa.square import Square
from momalisa.storage import parquet_bytes

ERROR = "error"
PART_WORKS = 512  # at most: its pixels are one Arrow value, and those end at 2 GiB

Work = dict[str, str]  # id, text, and the family's columns of the images table
Pixels = NDArray[np.uint8]  # [B, S, S, 3]


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
    squares: tuple[Square, ...]
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


def decode(part: dict[str, Any], squares: tuple[Square, ...], columns: tuple[str, ...]) -> dict[str, Any]:
    """A part with its table's bytes -> its works in order of id, those without a picture, and the others' pixels.

    Pixels are uint8: all works' first squares, then all their second ones.
    """
    began, wanted = time.monotonic(), json.loads(part["wanted"])
    names = ["id", "bytes", *columns]
    table = pq.read_table(io.BytesIO(part["data"]), columns=names, filters=[("id", "in", list(wanted))])
    found = sorted({row["id"]: row for row in table.to_pylist()}.values(), key=lambda row: str(row["id"]))
    works, failed, pixels = [], [], []
    for row in found:
        data, work = row.pop("bytes"), {**row, "text": wanted[row["id"]]}
        try:
            picture = open_picture(data)
            pixels.append([square(picture).tobytes() for square in squares])
            works.append(work)
        except Exception as error:
            failed.append([work, f"{type(error).__name__}: {error}"])
    joined = b"".join(item[number] for number in range(len(squares)) for item in pixels)
    seconds = time.monotonic() - began
    return {"works": json.dumps(works), "failed": json.dumps(failed), "pixels": joined, "decode_s": seconds}


def unpack(data: bytes, count: int, squares: tuple[Square, ...]) -> list[Pixels]:
    """The pixels of a decoded part, an array for each square."""
    arrays, start = [], 0
    for square in squares:
        size = count * square.bytes
        flat = np.frombuffer(data, dtype=np.uint8, count=size, offset=start)
        arrays.append(flat.reshape(count, square.size_px, square.size_px, 3))
        start += size
    return arrays


def fill(part: dict[str, Any], family: Family, model: Model) -> dict[str, Any]:
    """A decoded part -> its table's bytes, how many rows are good and bad, and the first errors."""
    began, works, batch = time.monotonic(), json.loads(part["works"]), family.settings.batch
    pixels = unpack(part["pixels"], len(works), family.squares)
    rows = [model.failed(work, error) for work, error in json.loads(part["failed"])]
    for start in range(0, len(works), batch):
        end = start + batch
        rows += model.rows(works[start:end], [array[start:end].copy() for array in pixels])  # a copy can be written to
    rows.sort(key=lambda row: str(row["id"]))
    bad = [f"{row['id']}: {row['error']}" for row in rows if row["status"] != OK]
    table = parquet_bytes(pa.Table.from_pylist(rows, schema=family.schema))
    counts = {"ok": len(rows) - len(bad), "bad": len(bad), "errors": json.dumps(bad[:3])}
    return {"data": table, **counts, "decode_s": part["decode_s"], "model_s": time.monotonic() - began}
