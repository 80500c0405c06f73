"""A small published collection: pictures of several shapes, rejects, a work that hangs twice, captions."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from momalisa.dataset import Dataset, Version
from momalisa.records import CAPTIONS, IMAGES, OK, REJECTED, Artwork, Reason

BLIP = "blip-1"


@cache
def picture(number: int, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    size = [(64, 48), (48, 64), (64, 64), (120, 40)][number % 4]
    Image.new("RGB", size, (number * 40 % 256, 90, 200 - number * 15)).save(sink, kind)
    return sink.getvalue()


def work(number: int, **changes: Any) -> Artwork:
    data = picture(number, "JPEG" if number % 3 == 2 else "PNG")
    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
    made = Artwork(
        id=f"w{number}", bytes=data, width=width, height=height, title=f"Work {number}", rights="CC0", sha256=f"{number}"
    )
    return replace(made, **changes)


def caption(id: str, text: str | None = None, status: str = OK) -> dict[str, Any]:
    short = (text or f"A MOMA artwork of: {id}") if status == OK else ""
    return {"id": id, "short": short, "long": "", "fused": "", "status": status, "error": ""}


def add(dataset: Dataset, works: list[Artwork], captions: list[dict[str, Any]] | None = None, captioner: str = BLIP) -> Version:
    """Publish more works and captions, as the jobs do."""
    latest = dataset.latest()
    if works:
        latest = latest.with_images([dataset.put_rows("images", [one.row() for one in works], IMAGES)])
    if captions:
        latest = latest.with_captions(captioner, [dataset.put_rows(f"captions/{captioner}", captions, CAPTIONS)])
    dataset.publish(latest)
    return latest


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(str(tmp_path / "out" / "dataset"))


@pytest.fixture
def collection(dataset: Dataset) -> Dataset:
    """w0 to w5 with pictures (w4 has no caption), bad0 and bad1 without, in two tables; w5 is w0 again."""
    import pyarrow as pa

    bad = [
        Artwork(id=f"bad{n}", status=REJECTED, error="the file is empty", reason=Reason.NOT_A_PICTURE, title=f"Bad {n}")
        for n in range(2)
    ]
    captions = [caption("w4", status="error"), *(caption(f"w{n}") for n in (0, 1, 2, 3, 5))]
    add(dataset, [work(n) for n in range(3)])
    add(dataset, [*(work(n) for n in range(3, 6)), *bad], captions)
    table = pa.Table.from_pylist([{"id": "w5", "duplicate_of": "w0", "kind": "exact"}])
    dataset.publish(replace(dataset.latest(), duplicates=(dataset.store.put_table("duplicates", table),)))
    return dataset


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Settings whose dataset is the fixture's."""
    path = tmp_path / "settings.yaml"
    path.write_text(f"name: wing\nroot: {tmp_path / 'out'}\n")
    return str(path)
