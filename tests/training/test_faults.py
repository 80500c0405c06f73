"""Disks that are full and datasets that change while a run is under way."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint
from momalisa.config import Diffusion, Encode, Settings, Train
from momalisa.dataset import Dataset
from momalisa.records import LATENTS
from momalisa.training import cache as caches
from momalisa.training import run as runs
from momalisa.training.loop import Events, Trainer
from momalisa.training.run import Plan
from ray_jobs import train as jobs
from tests.training.test_cache import row
from tests.training.test_options import run_of

HOME = Path(__file__).parents[2]


@contextmanager
def full_disk(left: int) -> Iterator[None]:
    """No file can become larger than this, as if the disk were full: the system answers EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tiny_base, tmp_path, images=24)
    trainer = Trainer(run, Events())
    submit = trainer.writer.submit

    def one_at_a_time(snapshot: Any) -> None:
        with full_disk(1000) if snapshot.checkpoint.images_seen == 16 else contextlib.nullcontext():
            submit(snapshot)
            trainer.writer.settle()

    trainer.writer.submit = one_at_a_time  # type: ignore[method-assign]
    trainer.train()
    assert "a checkpoint could not be written" in capsys.readouterr().out
    assert [saved.images_seen for saved in checkpoints.read_all(run.store, run.name)] == [8, 24]


def test_a_disk_that_stays_full_ends_the_run_and_the_last_good_checkpoint_stands(tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(tiny_base, tmp_path)
    with contextlib.ExitStack() as stack:

        def filled(checkpoint: Checkpoint) -> None:
            stack.enter_context(full_disk(1000))

        stack.enter_context(pytest.raises(OSError, match=r"could not be written: .*; free space and start again"))
        Trainer(run, Events(checkpointed=filled)).train()
    assert [saved.images_seen for saved in checkpoints.read_all(run.store, run.name)] == [8]
    assert Trainer(run, Events()).train().images_seen == 16  # goes on from it


def test_a_node_without_room_for_the_latents_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    dataset = Dataset(str(tmp_path / "dataset"))
    table = dataset.put_rows("latents/x", [row(f"w{n}", n, side=16) for n in range(40)], LATENTS)
    with full_disk(10_000), pytest.raises(OSError, match=r"could not be kept in .*; free space or set train.cache_dir"):
        caches.load(dataset, [table], tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]
    assert len(caches.load(dataset, [table], tmp_path / "cache")) == 40


def test_captions_that_change_under_a_run_are_another_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "captioner_id", lambda settings: "blip")
    train = Train(workers=1, images=8, batch=8, precision="fp32", cache_dir=str(tmp_path / "cache"))
    settings = Settings(root=str(tmp_path), diffusion=Diffusion(model=str(tiny_base)), encode=Encode(), train=train)
    dataset, encoder = Dataset(settings.dataset), runs.encoder_id(settings, "blip")

    def publish(word: str) -> None:
        latest = dataset.latest()
        rows = [{**row(f"w{n}", n, channels=4), "caption": f"{word} {n}", "token_ids": [n] * 77} for n in range(9)]
        path = dataset.put_rows(f"latents/{encoder}", rows, LATENTS)
        dataset.add(f"latents/{encoder}", [path], began=latest, instead_of=latest.latents.get(encoder, ()))

    def fit(settings: Settings, planned: Plan) -> None:
        publish("after")
        Trainer(runs.load(settings, planned), Events()).train()

    publish("before")
    planned = runs.plan(settings)
    monkeypatch.setattr("ray_jobs.train.fit", fit)
    assert jobs.run(settings)["run"] == planned.name
    assert "train: the dataset has changed since this run began" in capsys.readouterr().out
    assert {text.split()[0] for text in runs.load(settings, planned).cache.captions} == {"before"}
    renewed = runs.plan(settings)
    assert renewed.name != planned.name
    assert {text.split()[0] for text in runs.load(settings, renewed).cache.captions} == {"after"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--encode.resolution_px=500", "resolution_px=500 is not a multiple of 8; try 504"),
        ("--encode.bucket_step_px=20", "bucket_step_px=20 is not a multiple of 8; try 24"),
        ("--train.workers=9", "batch=32 makes 8 cells of 4, fewer than workers=9; try batch=36 or cell=3"),
        ("--train.cell=5", "batch=32 is not a multiple of cell=5; try 30 or 35"),
        ("--train.lora_rank=0", "train.lora_rank: adapters have a rank of at least 1; try 16"),
    ],
)
def test_the_job_says_what_is_wrong_and_what_to_try(override: str, message: str) -> None:
    command = [sys.executable, "-m", "ray_jobs.train", "--config", "configs/demo.yaml", override]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
