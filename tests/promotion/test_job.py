"""The promote job around the library: what is watched, what W&B is told, and when."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import wandb

from momalisa import checkpoint as checkpoints
from momalisa import promotion
from momalisa.checkpoint import Checkpoint, averages
from momalisa.checkpoint.retention import forget
from momalisa.config import Settings
from momalisa.promotion.ledger import Overtaken
from momalisa.storage import Store
from momalisa.training import run as runs
from ray_jobs import _cluster
from ray_jobs import promote as job
from tests.promotion.conftest import Museum
from tests.test_tracking import records


@pytest.fixture
def here(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The museum's run, its losses measured in this process instead of in Ray's tasks."""
    settings, planned = museum
    settings = changed(settings, "promote", gate_pictures=0, general_pictures=0, contact_prompts=())
    monkeypatch.setattr(runs, "plan", lambda _: planned)
    monkeypatch.setattr(_cluster, "connect", lambda: None)
    monkeypatch.setattr(job, "_map", lambda settings, function, calls: [function(*arguments) for arguments in calls])
    return settings


def changed(settings: Settings, section: str, **values: object) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def named_best(root: Path) -> list[str]:
    """The checkpoints that the offline runs below a root call best, which are then forgotten."""
    found = records(root)
    logged = [record.request.log_artifact.artifact for record in found if record.request.HasField("log_artifact")]
    logged += [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    shutil.rmtree(root / "wandb")
    return [json.loads(one.metadata)["checkpoint"] for one in logged if one.type == "model" and "best" in one.aliases]


def test_the_alias_best_follows_the_pointer_there_and_back(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    wandb.teardown()  # it reads the environment once
    settings, root = changed(here, "wandb", mode="offline"), Path(here.root)
    for call, expected in (
        (lambda: job.run(settings), "run@10"),
        (lambda: job.by_hand(settings, "run@20"), "run@20"),
        (lambda: job.rollback(settings), "run@10"),
    ):
        call()
        assert named_best(root) == [expected]
        assert checkpoints.read_best(Store(settings.root)).name == expected


def test_wandb_is_told_of_what_hangs_and_of_nothing_else(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    store, told = Store(here.root), []
    monkeypatch.setattr(job, "log_artifact", lambda _, pointer: told.append((pointer, store.read_json("refs/best"))))
    job.run(here)
    ((pointer, hanging),) = told
    assert pointer == hanging
    told.clear()
    monkeypatch.setattr(Store, "move_pointer", lambda *_: False)
    for overtaken in (lambda: job.by_hand(here, "run@20"), lambda: job.run(changed(here, "promote", timesteps=3))):
        with pytest.raises(Overtaken):
            overtaken()
    assert told == []


def test_a_damaged_average_is_one_candidate_less(here: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    settings = changed(changed(here, "train", power_ema=True), "promote", ema_lengths=(0.05, 0.1))
    store, planned = Store(settings.root), runs.plan(settings)
    newest = checkpoints.read_all(store, "run")[-1]
    whole = replace(newest, training={"settings": settings.train.model_dump(mode="json"), "losses": []})
    checkpoints.write(store, whole, Path(store.root) / newest.path / "weights")
    values = {name: value.detach() for name, value in checkpoints.load_unet(store, newest).named_parameters()}
    averages.write(store, newest.path, {0.05: values, 0.1: values})
    store.write_bytes(f"{newest.path}/averages/0.05.safetensors", b"noise")
    job.average(settings, planned)
    said = capsys.readouterr().out
    assert said.count("passed over") == 1
    assert "the average of sigma_rel=0.05 at run@20 cannot be made: " in said
    assert "0.05.safetensors has sha256" in said
    assert [one.name for one in promotion.candidates(settings, planned)] == ["run@10", "run@20", "run-ema0.100@20"]


def watched(here: Settings, monkeypatch: pytest.MonkeyPatch, meanwhile: list[Callable[[], None]], **more: object) -> None:
    """Watch with things that happen between two looks; a second passes with each of them."""
    now = [0.0]

    def sleep(_: float) -> None:
        now[0] += 1
        if meanwhile:
            meanwhile.pop(0)()

    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    job.watch(changed(changed(here, "train", images=100), "promote", watch_patience_s=3.0, **more))


def test_a_watch_measures_each_checkpoint_once_and_ends_with_training(
    here: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(here.root)
    ten, twenty = checkpoints.read_all(store, "run")

    def write(images_seen: int) -> Checkpoint:
        entry = replace(twenty, path=f"checkpoints/run/{images_seen:09d}", images_seen=images_seen)
        return checkpoints.write(store, entry, Path(store.root) / twenty.path / "weights")

    def replaced() -> None:  # as with train.keep_weights: one more, one less
        write(30)
        forget(store, ten)

    store.write_json("checkpoints/run/000000005/manifest.json", {"files": 3})
    with pytest.raises(ValueError, match=r"no new checkpoint of run for 3 s .*training seems to be over.* without --watch"):
        watched(here, monkeypatch, [lambda: None, replaced])
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == "promote: watching run"
    assert "" not in lines
    assert [line.split()[1] for line in lines if "has a held-out loss" in line] == ["run@20", "run@30"]
    assert said.count("000000005 is not a checkpoint of this program") == 2  # when there was something new
    done: list[Settings] = []
    monkeypatch.setattr(job, "run", lambda settings: done.append(settings) or {})
    watched(here, monkeypatch, [lambda: None, lambda: write(100) and None])
    assert len(done) == 1


def test_a_watch_says_that_it_waits_for_the_only_card(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = changed(here, "train", workers=1, gpus_per_worker=1.0)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    said = job._waits(changed(trained, "promote", gpus_per_task=1.0))
    assert said == "; measuring waits until 1 of this cluster's 1 GPUs is free: on a single card, when training ends"
    assert job._waits(changed(trained, "promote", gpus_per_task=0.0)) == ""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert job._waits(changed(trained, "promote", gpus_per_task=1.0)) == ""
