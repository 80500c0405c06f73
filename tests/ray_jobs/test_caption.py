"""Every picture gets its own caption once, a bad one becomes a row, and nothing half done is published."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from momalisa.captioner import Captioner, captioner_id
from momalisa.config import Settings
from momalisa.dataset import Dataset
from momalisa.records import IMAGES, Artwork
from ray_jobs import caption
from ray_jobs._tables import open_parts

HOME = Path(__file__).parents[2]


def with_caption(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update={"caption": settings.caption.model_copy(update=changes)})


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_pictures_are_captioned_once_whatever_the_pool(
    settings: Settings, collection: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    collected = collection.latest()
    summary = caption.run(settings)
    assert summary | {"seconds": 0, "rows_per_s": 0} == {
        "stage": "caption", "rows_in": 8, "rows_out": 7, "rejected": 1, "new": 8, "skipped": 0,
        "duplicates": 0, "seconds": 0, "rows_per_s": 0,
    }  # fmt: skip
    assert "caption: 8/8 works, 1 failed" in capsys.readouterr().out

    published = collection.latest()
    tables = published.captions[captioner_id(settings.caption)]
    assert len(tables) == 3
    rows = {row["id"]: row for row in collection.rows(tables)}
    assert len(rows) == 8
    bad = rows.pop("w12")
    assert (bad["short"], bad["status"], bad["error"]) == (
        "",
        "error",
        "ValueError: 10 bytes that are no picture in a known format",
    )
    works = {row["id"]: row["bytes"] for row in collection.rows(collected.images)}
    alone = Captioner.load(settings.caption)
    assert {id: row["short"] for id, row in rows.items()} == {
        id: alone.caption([Image.open(io.BytesIO(works[id]))])[0] for id in rows
    }

    again = caption.run(settings)
    assert (again["new"], again["skipped"], again["rows_out"], again["rejected"]) == (0, 8, 7, 1)
    assert "caption: nothing new (7 captions)" in capsys.readouterr().out
    assert collection.latest() == published

    collection.publish(collected)  # the same from the start, by two actors, is the same version
    caption.run(with_caption(settings, actors=2))
    assert collection.latest().sha256 == published.sha256


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_too_many_bad_pictures_publish_nothing(settings: Settings, collection: Dataset) -> None:
    before = collection.latest()
    with pytest.raises(ValueError, match=r"1 of 8 works failed, more than max_bad_fraction=0.1; nothing was published. w12: "):
        caption.run(with_caption(settings, max_bad_fraction=0.1))
    assert collection.latest() == before


def test_without_pictures_the_job_before_is_named(settings: Settings) -> None:
    with pytest.raises(ValueError, match="holds no pictures: run the collect job first"):
        caption.run(settings)


@pytest.mark.usefixtures("collection")
def test_a_wrong_model_fails_before_ray_starts(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs._cluster.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}: "):
        caption.run(with_caption(settings, model=str(tmp_path)))


def test_an_empty_caption_is_an_error(settings: Settings, collection: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = caption.load(settings.caption, "cpu")
    pixels = [model.prepare(row["bytes"]) for row in collection.rows(collection.latest().images) if row["id"].startswith("w0")]
    monkeypatch.setattr(Captioner, "generate", lambda self, pixels: ["", *(["a"] * (len(pixels) - 1))])
    first, second = model.rows(["x", "y"], ["", ""], pixels[:2])
    assert first == {"id": "x", "short": "", "status": "error", "error": "the caption is empty"}
    assert second == {"id": "y", "short": "a", "status": "ok", "error": ""}


def test_a_part_holds_what_is_not_done_and_each_id_once(collection: Dataset) -> None:
    twice = collection.put_rows("images", [Artwork(id="w00", bytes=b"other").row(), Artwork(id="w99").row()], IMAGES)
    images = (*collection.latest().images, twice)
    parts, total = open_parts(collection, images, done={"w01", "w20", "w21"}, texts=None)
    assert total == 9
    wanted = [id for part in parts for id in json.loads(part["wanted"])]
    assert sorted(wanted) == ["w00", "w02", "w10", "w11", "w12", "w99"]
    assert [part["table"] for part in parts] == sorted(part["table"] for part in parts)


@pytest.mark.parametrize("job", ["caption", "encode"])
def test_help_and_dry_run_import_nothing_heavy(job: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['x', *sys.argv[1:]]\ntry: runpy.run_module('ray_jobs.{job}', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    for arguments in (["--help"], ["--config", "configs/demo.yaml", "--dry-run"]):
        subprocess.run([sys.executable, "-c", code, *arguments], cwd=HOME, check=True, capture_output=True)
