"""A small collection for the jobs: three tables, one picture that is none, one work that was rejected."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from momalisa.config import Settings, from_file
from momalisa.dataset import Dataset
from momalisa.miniature import draw
from momalisa.records import IMAGES, REJECTED, Artwork

HOME = Path(__file__).parents[2]


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    draw.draw(draw.all_scenes()[number * 20], seed=number).save(buffer, "PNG")
    return buffer.getvalue()


def add_works(dataset: Dataset, works: list[Artwork]) -> None:
    """Publish one more images table."""
    path = dataset.put_rows("images", [work.row() for work in works], IMAGES)
    dataset.publish(dataset.latest().with_images([path]))


@pytest.fixture
def settings(tiny_base: Path, tiny_blip: Path, tmp_path: Path) -> Settings:
    """An empty root and tiny models; batches of two, so that a table takes several."""
    options = {
        "root": tmp_path / "root",
        "diffusion.model": tiny_base,
        "caption.model": tiny_blip,
        "caption.max_new_tokens": 6,
        "caption.max_bad_fraction": 0.2,
        "caption.batch": 2,
        "encode.batch": 2,
        "encode.resolution_px": 64,
    }
    return from_file(str(HOME / "configs" / "demo.yaml"), [f"--{key}={value}" for key, value in options.items()])


@pytest.fixture
def collection(settings: Settings) -> Dataset:
    """Seven works and a picture that is none: `w12`; `rejected` never came to a picture."""
    dataset = Dataset(settings.dataset)
    known = {"title": "Sea", "artist": "Klee", "medium": "ink"}
    add_works(dataset, [Artwork(id=f"w0{n}", bytes=png(n), **(known if n == 0 else {})) for n in range(3)])
    add_works(dataset, [Artwork(id=f"w1{n}", bytes=png(3 + n) if n < 2 else b"no picture") for n in range(3)])
    add_works(dataset, [Artwork(id=f"w2{n}", bytes=png(5 + n)) for n in range(2)])
    add_works(dataset, [Artwork(id="rejected", status=REJECTED, error="404")])
    return dataset
