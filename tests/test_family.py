"""A part becomes the same table wherever it is decoded and filled, with a row for each of its works."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from momalisa import family as families
from momalisa.buckets import Bucketed
from momalisa.config import Caption
from momalisa.family import Family, Model, Pixels, Work
from momalisa.records import IMAGES, Artwork
from momalisa.square import Square
from momalisa.storage import parquet_bytes

SQUARES = (Square(4), Square(6))
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "said", "status", "error")])


class Reader(Model):
    """Says what it was given: a work's text, title and the grey of each of its squares."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def rows(self, works: list[Work], pixels: list[Pixels]) -> list[dict[str, Any]]:
        self.batches.append([work["id"] for work in works])
        shapes = [(len(works), square.size_px, square.size_px, 3) for square in SQUARES]
        assert [array.shape for array in pixels] == shapes
        assert all(array.flags.writeable for array in pixels)
        greys = zip(*[[str(picture[0, 0, 0]) for picture in array] for array in pixels], strict=True)
        said = [" ".join([work["text"], work["title"], *grey]) for work, grey in zip(works, greys, strict=True)]
        return [{"id": work["id"], "said": text, "status": "ok", "error": ""} for work, text in zip(works, said, strict=True)]

    def failed(self, work: Work, error: str) -> dict[str, Any]:
        return {"id": work["id"], "said": "", "status": "error", "error": error}


def picture(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (9, 7), grey).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def family() -> Family:
    return Family("read", Caption(batch=2), "read", SCHEMA, SQUARES, lambda device: Reader(), ("title",))


@pytest.fixture
def part() -> dict[str, Any]:
    """Five works, of which one has no picture and one is not wanted; out of order, one twice."""
    works = [Artwork(id=f"w{n}", bytes=picture(n * 10), title=f"t{n}") for n in (4, 2, 0, 3)]
    works += [Artwork(id="w1", bytes=b"no picture"), works[0]]
    table = pa.Table.from_pylist([work.row() for work in works], schema=IMAGES)
    return {"wanted": json.dumps({f"w{n}": f"x{n}" for n in (0, 1, 2, 4)}), "data": parquet_bytes(table)}


def test_each_wanted_work_becomes_a_row_from_its_own_pixels(family: Family, part: dict[str, Any]) -> None:
    model = Reader()
    made = families.fill(families.decode(part, SQUARES, ("title",)), family, model)
    assert pq.read_table(io.BytesIO(made["data"])).to_pylist() == [
        {"id": "w0", "said": "x0 t0 0 0", "status": "ok", "error": ""},
        {"id": "w1", "said": "", "status": "error", "error": "ValueError: 10 bytes that are no picture in a known format"},
        {"id": "w2", "said": "x2 t2 20 20", "status": "ok", "error": ""},
        {"id": "w4", "said": "x4 t4 40 40", "status": "ok", "error": ""},
    ]
    assert (made["ok"], made["bad"]) == (3, 1)
    assert model.batches == [["w0", "w2"], ["w4"]]
    assert made["decode_s"] > 0
    assert made["model_s"] > 0


def test_pixels_travel_as_bytes(part: dict[str, Any]) -> None:
    decoded = families.decode(part, SQUARES, ())
    assert isinstance(decoded["pixels"], bytes)
    assert len(decoded["pixels"]) == 3 * (4 * 4 * 3 + 6 * 6 * 3)
    first, second = families.unpack(decoded["pixels"], json.loads(decoded["shapes"]))
    assert [array[0, 0, 0] for array in first] == [0, 20, 40]
    assert [array[5, 5, 2] for array in second] == [0, 20, 40]


def test_a_batch_holds_pictures_of_one_shape(family: Family) -> None:
    sizes = {"w0": (20, 10), "w1": (10, 10), "w2": (20, 10), "w3": (10, 20), "w4": (20, 10)}
    rows = []
    for number, (name, size) in enumerate(sizes.items()):
        buffer = io.BytesIO()
        Image.new("L", size, number * 10).save(buffer, "PNG")
        rows.append(Artwork(id=name, bytes=buffer.getvalue()).row())
    part = {"wanted": json.dumps(dict.fromkeys(sizes, "")), "data": parquet_bytes(pa.Table.from_pylist(rows, schema=IMAGES))}
    seen: list[tuple[list[str], tuple[int, ...], list[int]]] = []

    class Shapes(Reader):
        def rows(self, works: list[Work], pixels: list[Pixels]) -> list[dict[str, Any]]:
            seen.append(([work["id"] for work in works], pixels[0].shape, pixels[0][:, 0, 0, 0].tolist()))
            return [{"id": work["id"], "said": "", "status": "ok", "error": ""} for work in works]

    made = families.fill(families.decode(part, (Bucketed(64, 8),), ()), family, Shapes())
    assert seen == [
        (["w0", "w2"], (2, 48, 88, 3), [0, 20]),
        (["w4"], (1, 48, 88, 3), [40]),
        (["w1"], (1, 64, 64, 3), [10]),
        (["w3"], (1, 88, 48, 3), [30]),
    ]
    assert [row["id"] for row in pq.read_table(io.BytesIO(made["data"])).to_pylist()] == sorted(sizes)


def test_a_part_without_any_picture_needs_no_batch(family: Family, part: dict[str, Any]) -> None:
    model = Reader()
    made = families.fill(families.decode({**part, "wanted": '{"w1": ""}'}, SQUARES, ("title",)), family, model)
    assert (made["ok"], made["bad"], model.batches) == (0, 1, [])


def test_a_big_table_is_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "PART_WORKS", 2)
    wanted = {f"w{n}": str(n) for n in range(5)}
    parts = list(families.split({"table": "t", "wanted": json.dumps(wanted)}))
    assert [len(json.loads(part["wanted"])) for part in parts] == [2, 2, 1]
    assert {part["table"] for part in parts} == {"t"}
    assert {id: text for part in parts for id, text in json.loads(part["wanted"]).items()} == wanted
