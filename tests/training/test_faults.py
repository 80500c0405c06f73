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
import torch

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint
from momalisa.config import Diffusion, Encode, Settings, Train, Wandb
from momalisa.dataset import Dataset
from momalisa.latents import TextEncoder
from momalisa.records import LATENTS
from momalisa.tracking import Tracker
from momalisa.training import cache as caches
from momalisa.training import run as runs
from momalisa.training.loop import Events, Interrupted, Trainer
from momalisa.training.run import Plan
from momalisa.training.watch import Gallery
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


def test_pictures_that_cannot_be_made_cost_no_checkpoint(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tiny_base, tmp_path, images=40, evaluate_every_steps=1)
    encode, train = Encode(resolution_px=32), run.train.model_copy(update={"evaluation_steps": 1})
    settings = Settings(root=str(tmp_path), diffusion=run.diffusion, encode=encode, train=train, wandb=Wandb(mode="disabled"))
    gallery = Gallery(settings, Plan(run.name, "e", ()), Tracker(settings, run.name, "train"))

    def due(images_seen: int, unet: torch.nn.Module, text_encoder: TextEncoder) -> None:
        trainer.writer.settle()
        assert checkpoints.read_all(run.store, run.name)[-1].images_seen == images_seen  # it does not wait for pictures
        with full_disk(1000) if images_seen in (16, 40) else contextlib.nullcontext():
            if images_seen == 24:
                with torch.no_grad():
                    next(unet.parameters()).fill_(torch.nan)
            gallery.hang(images_seen, unet, text_encoder)

    trainer = Trainer(run, Events(pictures_due=due))
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "no pictures after" in line]
    assert [int(line.split()[4]) for line in said] == [16, 24, 40]
    assert said[1].startswith("train: no pictures after 24 images (GenerationError: ")
    assert trainer.bare.unet.training
    assert [saved.images_seen for saved in checkpoints.read_all(run.store, run.name)] == [8, 16, 24, 32, 40]
    assert [path.name for path in sorted(tmp_path.glob("reports/*/0*.png"))] == ["000000008.png", "000000032.png"]


def test_a_disk_that_is_full_when_training_is_asked_to_end(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tiny_base, tmp_path, images=240, checkpoint_every_images=56)
    trainer = Trainer(run, Events())
    with contextlib.ExitStack() as stack:

        def ending() -> bool:
            if trainer.progress.images_seen == 80:
                trainer.writer.settle()
                stack.enter_context(full_disk(1000))
            return trainer.progress.images_seen == 80

        trainer.events.ending = ending
        with pytest.raises(
            Interrupted, match=r"^80 images seen, but no checkpoint of them \(.*; the same command goes on from the"
        ):
            trainer.train()
    assert "a checkpoint could not be written" in capsys.readouterr().out
    assert [saved.images_seen for saved in checkpoints.read_all(run.store, run.name)] == [56]


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
        ("--train.workers=9", "batch=32 makes 8 cells of 4, fewer than workers=9; try batch=36 or cell=2"),
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
