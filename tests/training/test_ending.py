"""Training that is asked to end: a checkpoint of that very step, and a run that goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from momalisa.checkpoint import Checkpoint, read_all
from momalisa.config import Settings, from_file
from momalisa.storage import Store
from momalisa.training import run as runs
from momalisa.training.loop import Events, Interrupted, Trainer
from momalisa.training.writer import Snapshot, Writer
from tests.integration.test_elastic import publish

HOME = Path(__file__).parents[2]


def settings(base: Path, root: Path) -> Settings:
    options = {"root": root, "diffusion.model": base, "train.images": 192, "train.batch": 4, "train.cell": 1, "train.workers": 1,
               "train.precision": "fp32", "train.checkpoint_every_images": 100_000, "train.evaluation_prompts": "[]"}  # fmt: skip
    made = from_file(str(HOME / "configs" / "demo.yaml"), [f"--{key}={value}" for key, value in options.items()])
    publish(made)
    return made


def test_it_ends_where_it_is_asked_and_nothing_is_lost(tiny_base: Path, tmp_path: Path) -> None:
    ours, theirs = settings(tiny_base, tmp_path / "ended"), settings(tiny_base, tmp_path / "left-alone")
    plan, asked = runs.plan(ours), iter([False, True])
    with pytest.raises(Interrupted, match="80 images seen"):
        Trainer(runs.load(ours, plan), Events(ending=lambda: next(asked))).train()
    store = Store(ours.root)
    assert [saved.images_seen for saved in read_all(store, plan.name)] == [80]
    Trainer(runs.load(ours, plan), Events(ending=lambda: False)).train()
    Trainer(runs.load(theirs, plan), Events()).train()
    resumed, whole = read_all(store, plan.name)[-1], read_all(Store(theirs.root), plan.name)[-1]
    assert resumed.files == whole.files
    assert resumed.training["losses"] == whole.training["losses"]


def test_a_run_that_ends_anyway_is_not_interrupted(tiny_base: Path, tmp_path: Path) -> None:
    made = settings(tiny_base, tmp_path / "short").model_copy()
    made = made.model_copy(update={"train": made.train.model_copy(update={"images": 40})})
    assert Trainer(runs.load(made, runs.plan(made)), Events(ending=lambda: True)).train().images_seen == 40


@pytest.mark.parametrize("fails", [False, True])
def test_a_checkpoint_of_that_step_is_written_again_only_if_it_failed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    made, write, begun = settings(tiny_base, tmp_path), Writer._write, list[int]()
    made = made.model_copy(update={"train": made.train.model_copy(update={"checkpoint_every_images": 40})})
    plan, asked = runs.plan(made), iter([False, True])

    def noted(writer: Writer, snapshot: Snapshot) -> Checkpoint:
        begun.append(snapshot.checkpoint.images_seen)
        if fails and begun == [40, 80]:
            raise OSError("the bucket is busy")
        return write(writer, snapshot)

    monkeypatch.setattr(Writer, "_write", noted)
    with pytest.raises(Interrupted, match="80 images seen; the same command goes on from there"):
        Trainer(runs.load(made, plan), Events(ending=lambda: next(asked))).train()
    assert begun == ([40, 80, 80] if fails else [40, 80])
    assert [saved.images_seen for saved in read_all(Store(made.root), plan.name)] == [40, 80]
