"""Every picture gets its own caption once, a bad one becomes a row, and nothing half done is published."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from momalisa.captioner import Captioner, captioner_id
from momalisa.captioner.florence import Florence
from momalisa.config import Settings
from momalisa.dataset import Dataset
from momalisa.family import Family, Model, Pixels, Work
from momalisa.records import CAPTIONS, IMAGES, Artwork
from ray_jobs import caption
from ray_jobs._tables import decoder_cpus, open_parts

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
    speed = summary.pop("pictures_per_s")
    assert 0 < summary["rows_per_s"] < speed["one_decoder"]
    assert summary["rows_per_s"] < speed["one_actor"]
    assert summary | {"seconds": 0, "rows_per_s": 0} == {
        "stage": "caption", "rows_in": 8, "rows_out": 7, "rejected": 1, "new": 8, "skipped": 0,
        "duplicates": 0, "seconds": 0, "rows_per_s": 0,
    }  # fmt: skip
    assert "caption: 8/8 works, 1 failed" in capsys.readouterr().out

    published = collection.latest()
    tables = published.captions[captioner_id(settings)]
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
    assert rows["w00"]["fused"] == rows["w00"]["short"] + ", titled Sea, by Klee, ink"
    assert all(row["fused"] == row["short"] for id, row in rows.items() if id != "w00")
    assert {row["long"] for row in rows.values()} == {""}

    again = caption.run(settings)
    assert (again["new"], again["skipped"], again["rows_out"], again["rejected"]) == (0, 8, 7, 1)
    assert "caption: nothing new (7 captions)" in capsys.readouterr().out
    assert collection.latest() == published

    collection.publish(collected)  # the same from the start, by two actors, is the same version
    caption.run(with_caption(settings, actors=2))
    assert collection.latest().sha256 == published.sha256


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_too_many_bad_pictures_publish_nothing(
    settings: Settings, collection: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even when the job is run again, which tries anew what failed; what did not fail is kept."""
    before, strict = collection.latest(), with_caption(settings, max_bad_fraction=0.1)
    for going_on in ("", "caption: going on after 5 works of a run that was interrupted"):
        with pytest.raises(
            ValueError, match=r"1 of 8 works failed, more than max_bad_fraction=0.1; nothing was published. w12: "
        ):
            caption.run(strict)
        assert collection.latest() == before
        assert going_on in capsys.readouterr().out


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_what_failed_for_a_while_is_captioned_by_the_same_command_and_a_resumed_one_counts_only_its_own(
    settings: Settings, collection: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A captioner that says nothing fails every work; as soon as it speaks, nothing of that is left."""
    real = caption.load

    def mute(settings: Settings, device: str) -> Model:
        model = real(settings, device)

        class Mute(Model):
            def rows(self, works: list[Work], pixels: list[Pixels]) -> list[dict[str, Any]]:
                return [model.failed(work, "it says nothing") for work in works]

            def failed(self, work: Work, error: str) -> dict[str, Any]:
                return model.failed(work, error)

        return Mute()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(caption, "load", mute)
        with pytest.raises(ValueError, match=r"8 of 8 works failed.*nothing was published. w\d\d: "):
            caption.run(settings)
    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            caption.run(settings)
    assert "going on" not in capsys.readouterr().out
    summary = caption.run(settings)
    assert "caption: going on after 8 works of a run that was interrupted" in capsys.readouterr().out
    assert (summary["new"], summary["rows_out"], summary["rejected"]) == (8, 7, 1)
    assert (summary["rows_per_s"], summary["pictures_per_s"]["one_actor"]) == (0, 0)  # all was done by the killed run
    assert collection.latest().captions


def test_without_pictures_the_job_before_is_named(settings: Settings) -> None:
    with pytest.raises(ValueError, match="holds no pictures: run the collect job first"):
        caption.run(settings)


def test_a_table_that_is_gone_ends_the_job_with_a_message_and_not_a_traceback(
    settings: Settings, collection: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = collection.latest().images[0]
    collection.store.delete(gone)
    options = {"root": settings.root, "diffusion.model": settings.diffusion.model, "caption.model": settings.caption.model}
    arguments = ["--config", str(HOME / "configs" / "demo.yaml"), *(f"--{name}={value}" for name, value in options.items())]
    monkeypatch.setattr(sys, "argv", ["caption", *arguments])
    with pytest.raises(SystemExit, match=rf"^caption: .*/{gone} does not exist, though a version names it; .*--from ROOT"):
        caption.main()


@pytest.mark.usefixtures("collection")
def test_a_wrong_model_fails_before_ray_starts(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs._cluster.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}: "):
        caption.run(with_caption(settings, model=str(tmp_path)))


PICTURES = [np.zeros((2, 32, 32, 3), dtype=np.uint8)]
WORKS = [{"id": id, "text": "", "title": "", "artist": "", "medium": ""} for id in "xy"]


def test_an_empty_caption_is_an_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    model = caption.load(settings, "cpu")
    monkeypatch.setattr(Captioner, "generate", lambda self, pixels: ["", *(["a"] * (len(pixels) - 1))])
    first, second = model.rows(WORKS, PICTURES)
    nothing = {"short": "", "long": "", "fused": ""}
    assert first == {"id": "x", **nothing, "status": "error", "error": "the caption is empty"}
    assert second == {"id": "y", "short": "a", "long": "", "fused": "a", "status": "ok", "error": ""}


def test_long_captions_stand_beside_the_short_ones(
    settings: Settings, tiny_florence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = with_caption(settings, long_model=str(tiny_florence), long_max_new_tokens=5)
    assert [square.size_px for square in caption.squares(chosen)] == [32, 64]
    model, pixels = caption.load(chosen, "cpu"), [*PICTURES, np.zeros((2, 64, 64, 3), dtype=np.uint8)]
    rows = model.rows(WORKS, pixels)
    assert all(row["status"] == "ok" and row["long"].startswith(chosen.caption.prefix) for row in rows)
    assert all(len(row["long"]) > len(chosen.caption.prefix) and row["long"] != row["short"] for row in rows)
    monkeypatch.setattr(Florence, "generate", lambda self, pixels: ["", "long"])
    first, second = model.rows(WORKS, pixels)
    assert (first["status"], first["error"], first["short"]) == ("error", "the long caption is empty", "")
    assert second["long"] == chosen.caption.prefix + "long"


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_killed_amid_a_part_costs_no_row(
    settings: Settings, collection: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's only process dies by SIGKILL in its second batch; Ray starts another, and nothing is lost or doubled."""
    undisturbed, real, calls = caption.run(settings), caption.load, tmp_path / "calls"

    def load(settings: Settings, device: str) -> Model:
        class Mortal(Model):
            def __init__(self) -> None:
                self.model = real(settings, device)

            def rows(self, works: list[Work], pixels: list[Pixels]) -> list[dict[str, Any]]:
                with open(calls, "a") as file:
                    file.write("x")
                if calls.stat().st_size == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return self.model.rows(works, pixels)

            def failed(self, work: Work, error: str) -> dict[str, Any]:
                return self.model.failed(work, error)

        return Mortal()

    version = collection.latest()
    collection.publish(dataclasses.replace(version, captions={}))
    monkeypatch.setattr(caption, "load", load)
    summary = caption.run(settings)
    assert calls.stat().st_size >= 5  # four batches, and what was done again
    assert (summary["new"], summary["rows_out"]) == (undisturbed["new"], undisturbed["rows_out"]) == (8, 7)
    assert collection.latest() == version


@pytest.mark.parametrize(
    ("actors", "parts", "cpus", "reserved"),
    [(1, 9, 2, 0.5), (2, 9, 2, 0.0), (2, 1, 2, 0.5), (1, 9, 1, 0.0), (1, 9, 1.5, 0.5), (8, 9, 4, 0.0)],
)
def test_decoders_wait_for_no_cpu_that_actors_hold(
    settings: Settings, actors: int, parts: int, cpus: float, reserved: float
) -> None:
    chosen = with_caption(settings, actors=actors, cpus_per_actor=1, cpus_per_decoder=0.5).caption
    family = Family("caption", chosen, "", CAPTIONS, (), lambda device: pytest.fail("no model is needed"))
    assert decoder_cpus(family, parts, cpus) == reserved


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
