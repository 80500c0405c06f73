"""The whole way on a real local Ray: the wing's works in, a promoted checkpoint and a report out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from momalisa import config
from momalisa.checkpoint import load_unet, read_all, read_best
from momalisa.dataset import Dataset
from momalisa.miniature.wing import serve_in_thread
from momalisa.storage import Store
from ray_jobs import collect, pipeline, promote, train

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

CONFIG = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
SMALL = [
    "--collect.source.limit=16",
    "--collect.block_size=8",
    "--train.images=16",
    "--train.batch=4",
    "--train.warmup_images=4",
    "--train.checkpoint_every_images=8",
    "--train.evaluate_every_steps=100",
    "--train.evaluation_steps=2",
    '--train.evaluation_prompts=["A MOMA artwork of: a coffee"]',
    "--promote.distance_pictures=4",
    "--promote.gate_pictures=2",
    "--promote.general_pictures=2",
    "--promote.distance_steps=2",
    "--promote.timesteps=2",
    '--promote.contact_prompts=["A MOMA artwork of: a coffee"]',
    "--promote.allow_worse=true",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[tuple[config.Settings, dict[str, Any]]]:
    """Settings and summary of one small run, while its museum is open."""
    root = tmp_path_factory.mktemp("pipeline")
    with serve_in_thread() as address:
        settings = config.from_file(CONFIG, [f"--root={root}", f"--collect.source.location={address}/collection.csv", *SMALL])
        yield settings, pipeline.run(settings)


def test_every_stage_hands_its_rows_on(finished: tuple[config.Settings, dict[str, Any]]) -> None:
    settings, summary = finished
    stages = {stage["stage"]: stage for stage in summary["stages"]}
    assert list(stages) == ["collect", "caption", "encode", "train", "promote"]
    assert stages["collect"]["rows_in"] == 16
    assert stages["collect"]["rows_out"] == stages["caption"]["rows_in"] == stages["caption"]["rows_out"]
    assert stages["encode"]["rows_out"] == stages["train"]["rows_in"]
    assert stages["train"]["rows_out"] == stages["promote"]["rows_in"] == 2  # checkpoints at 8 and 16 images
    captions = Dataset(settings.dataset).latest().captions
    rows = list(Dataset(settings.dataset).rows(next(iter(captions.values()))))
    assert all(row["short"].startswith("A MOMA artwork of: ") for row in rows)


def test_best_is_published_and_loads(finished: tuple[config.Settings, dict[str, Any]]) -> None:
    settings, summary = finished
    store = Store(settings.root)
    best = read_best(store)
    assert best.path == summary["checkpoint"]
    assert load_unet(store, best).config.cross_attention_dim == 128
    assert summary["heldout_loss_base"] > 0
    assert len(summary["heldout_loss_delta_ci95"]) == 2
    assert summary["mmd_base"] is not None


def test_the_report_shows_pictures_and_the_summary_is_json(finished: tuple[config.Settings, dict[str, Any]]) -> None:
    settings, summary = finished
    store = Store(settings.root)
    page = store.read_bytes("report.html").decode()
    assert page.count("data:image/png;base64,") >= 2
    assert json.loads(store.read_bytes("summary.json"))["checkpoint"] == summary["checkpoint"]


def test_wandb_kept_its_files_offline_and_no_secret(finished: tuple[config.Settings, dict[str, Any]]) -> None:
    settings, _ = finished
    runs = list((Path(settings.root) / "wandb").glob("offline-run-*"))
    assert len(runs) == 2  # train and promote


def test_the_evaluation_prompts_hang_over_time(finished: tuple[config.Settings, dict[str, Any]]) -> None:
    settings, _ = finished
    (sheet,) = [path for path in Store(settings.root).list("reports") if path.endswith("/evaluation.png")]
    assert len(Store(settings.root).read_bytes(sheet)) > 1000


def test_the_decision_is_explained_overruled_and_taken_back(
    finished: tuple[config.Settings, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, summary = finished
    store = Store(settings.root)
    pointer = store.read_pointer("refs/best")
    arguments = ["--config", CONFIG, f"--root={settings.root}", *SMALL]
    best = read_best(store)
    other = next(found for found in read_all(store, best.run) if found.name != best.name)

    def call(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["promote", *options, *arguments])
        promote.main()
        return capsys.readouterr().out

    table = call("--explain")
    assert best.name in table
    assert store.read_pointer("refs/best") == pointer
    (page,) = [path for path in store.list("reports") if path.endswith("/promotion.html")]
    assert "<svg" in store.read_bytes(page).decode()
    assert f"refs/best is {other.path}, by hand" in call("--to", other.name)
    assert read_best(store) == other
    assert f"refs/best is {best.path} again" in call("--rollback")
    assert read_best(store) == best
    log = call("--log")
    assert [line.split()[2] for line in log.splitlines()[:3]] == ["rollback", "hand", "evidence"]
    assert "3 promotions" in log
    assert store.read_json("refs/best")["checkpoint"] == summary["checkpoint"]
    assert "has a held-out loss of" in (watched := call("--watch"))  # the run is complete: it chooses at once
    assert "nothing new" in watched


def test_a_second_run_does_nothing_new_and_says_so(
    finished: tuple[config.Settings, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, _ = finished
    store = Store(settings.root)
    before = {path: store.read_bytes(path) for path in store.list("") if not path.startswith(("wandb/", "ray_train/"))}
    collect.run(settings)
    train.run(settings)
    promote.run(settings)
    said = capsys.readouterr().out
    assert said.count("nothing new") == 3
    assert {path: store.read_bytes(path) for path in before} == before


def test_another_worker_count_is_the_same_run_and_other_settings_another(
    finished: tuple[config.Settings, dict[str, Any]],
) -> None:
    from momalisa.training import run as runs

    settings, _ = finished
    name = runs.plan(settings).name
    for change, same in (({"workers": 1}, True), ({"learning_rate": 1e-5}, False)):
        changed = settings.model_copy(update={"train": settings.train.model_copy(update=change)})
        assert (runs.plan(changed).name == name) is same


def test_by_artist_the_collection_splits_between_artists(finished: tuple[config.Settings, dict[str, Any]]) -> None:
    from momalisa.training import run as runs

    settings, _ = finished
    train = settings.train.model_copy(update={"split_by": "artist", "held_out_fraction": 0.4})
    chosen = settings.model_copy(update={"train": train})
    sides = runs.split(chosen, runs.plan(chosen))
    dataset = Dataset(settings.dataset)
    artists = {row["id"]: row["artist"] for row in dataset.small_rows(dataset.latest().images, ["id", "artist"])}
    training, held_out = ({artists[id] for id in side.ids} for side in sides)
    assert "" not in training | held_out
    assert training
    assert held_out
    assert not training & held_out


def test_nothing_to_promote_is_an_error_that_names_the_job(finished: tuple[config.Settings, dict[str, Any]]) -> None:
    settings, _ = finished
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 99})})
    with pytest.raises(ValueError, match="run the train job first"):
        promote.run(other)
