"""A run's name says what decides its result, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from momalisa import config
from momalisa.checkpoint import Checkpoint
from momalisa.config import Settings
from momalisa.dataset import Dataset
from momalisa.records import DUPLICATES, IMAGES, LATENTS, MIRRORED_LATENTS, Artwork
from momalisa.training import run as runs
from momalisa.weights import identity, short_id
from ray_jobs import train as jobs


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings whose dataset has twenty encoded works."""
    monkeypatch.setattr(runs, "captioner_id", lambda caption: "blip")
    made = Settings(name="small", root=str(tmp_path), diffusion=config.Diffusion(model=str(tiny_base)))
    dataset = Dataset(made.dataset)
    encoder = runs.encoder_id(made, "blip")
    moments = np.zeros((8, 2, 2), dtype="<f2").tobytes()
    shape = {"channels": 4, "height": 2, "width": 2}
    rows = [
        {"id": f"w{i}", "moments": moments, **shape, "caption": f"a {i}", "token_ids": [0] * 77, "status": "ok", "error": ""}
        for i in range(20)
    ]
    tables = [dataset.put_rows(f"latents/{encoder}", part, LATENTS) for part in (rows[:10], rows[10:])]
    dataset.publish(dataset.latest().with_latents(encoder, tables))
    return made


def trained(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update={"train": settings.train.model_copy(update=changes)})


def test_the_same_settings_are_the_same_run(settings: Settings) -> None:
    planned = runs.plan(settings)
    assert planned.name.startswith("small-")
    assert runs.plan(settings) == planned
    assert len(planned.tables) == 2


@pytest.mark.parametrize("change", [{"workers": 4}, {"micro_batch": 2}, {"evaluate_every_steps": 1}, {"max_failures": 9}])
def test_how_it_runs_does_not_name_it(settings: Settings, change: dict[str, Any]) -> None:
    assert runs.plan(trained(settings, **change)) == runs.plan(settings)


@pytest.mark.parametrize("change", [{"seed": 1}, {"images": 7}, {"batch": 8}, {"lora_rank": 2}, {"learning_rate": 1e-3}])
def test_what_decides_its_result_names_it(settings: Settings, change: dict[str, Any]) -> None:
    assert runs.plan(trained(settings, **change)).name != runs.plan(settings).name


def test_later_settings_name_a_run_only_where_they_are_used(settings: Settings) -> None:
    """So that runs of before keep their names."""
    planned, chosen = runs.plan(settings), settings.train
    before = chosen.model_dump(exclude=runs.SHELL_SETTINGS | {"deterministic", "split_by", "flip"}) | {"cell": chosen.cell_size}
    assert planned.name == f"small-{short_id(before, identity(settings.diffusion.model), list(planned.tables))}"
    assert runs.plan(trained(settings, deterministic=True)).name != planned.name
    assert runs.plan(trained(settings, split_by="artist")).name != planned.name
    assert runs.plan(trained(settings, flip=True)).name != planned.name


def test_a_run_that_stopped_early_is_complete_while_it_may_stop(settings: Settings) -> None:
    def found(images_seen: int, stopped: bool) -> list[Checkpoint]:
        return [Checkpoint("checkpoints/x/1", "x", images_seen, {}, {}, training={"stopped": stopped})]

    patient = trained(settings, early_stop_patience=3)
    assert not runs.complete(settings, [])
    assert not runs.complete(patient, found(1000, stopped=False))
    assert runs.complete(patient, found(1000, stopped=True))
    assert not runs.complete(settings, found(1000, stopped=True))
    assert runs.complete(settings, found(settings.train.images, stopped=False))


def test_more_works_are_another_run(settings: Settings) -> None:
    before, dataset = runs.plan(settings), Dataset(settings.dataset)
    row = next(dataset.rows([before.tables[0]]))
    table = dataset.put_rows(f"latents/{before.encoder_id}", [{**row, "id": "new"}], LATENTS)
    dataset.publish(dataset.latest().with_latents(before.encoder_id, [table]))
    assert runs.plan(settings).name != before.name


def test_mirror_images_are_another_encoders(settings: Settings) -> None:
    """What was encoded without them goes on being trained on without."""
    wanted = trained(settings, flip=True).model_copy(update={"encode": config.Encode(mirrored=True)})
    with pytest.raises(ValueError, match=r"holds no latents of encoder .*: run the encode job first.* python -m ray_jobs.encode"):
        runs.plan(wanted)
    dataset, encoder = Dataset(settings.dataset), runs.encoder_id(wanted, "blip")
    mirrored = np.full((8, 2, 2), 3, dtype="<f2").tobytes()
    rows = [{**row, "mirrored": mirrored} for row in dataset.rows(runs.plan(settings).tables)]
    table = dataset.put_rows(f"latents/{encoder}", rows, MIRRORED_LATENTS)
    dataset.publish(dataset.latest().with_latents(encoder, [table]))
    flipping, plain = (runs.load(one, runs.plan(one)).cache for one in (wanted, settings))
    assert flipping.mirrored is not None
    assert len(flipping.mirrored) == len(flipping) > 0
    assert {float(value) for moments in flipping.mirrored for value in moments.unique()} == {3}
    assert {float(value) for moments in flipping.moments for value in moments.unique()} == {0}
    assert (plain.mirrored, plain.ids) == (None, flipping.ids)


def test_what_turned_out_to_be_a_duplicate_is_not_trained_on(settings: Settings) -> None:
    before, dataset = runs.plan(settings), Dataset(settings.dataset)
    found = {"duplicate_of": "w4", "kind": "near", "distance": 2, "correlation": 0.99}
    strangers = dataset.put_rows("duplicates", [{"id": "not encoded", **found}], DUPLICATES)
    dataset.publish(replace(dataset.latest(), duplicates=(strangers,)))
    assert runs.plan(settings) == before
    late = dataset.put_rows("duplicates", [{"id": "w3", **found}], DUPLICATES)
    dataset.publish(replace(dataset.latest(), duplicates=(late,)))
    planned = runs.plan(settings)
    training, held_out = runs.split(settings, planned)
    assert planned.name != before.name
    assert sorted(training.ids + held_out.ids) == sorted(f"w{i}" for i in range(20) if i != 3)


def signed(settings: Settings, artists: dict[str, str]) -> None:
    """Publish images of these works instead of those that there are."""
    dataset = Dataset(settings.dataset)
    table = dataset.put_rows("images", [Artwork(id=id, artist=artist).row() for id, artist in artists.items()], IMAGES)
    dataset.publish(replace(dataset.latest(), images=(table,)))


def test_by_artist_nobody_is_trained_on_and_held_out(settings: Settings) -> None:
    artists = {f"w{i}": f"Artist {i % 5}" for i in range(18)}  # and two works that no image tells of
    signed(settings, {**artists, "not encoded": "Artist 7"})
    chosen = trained(settings, split_by="artist", held_out_fraction=0.4)
    planned = runs.plan(chosen)
    training, held_out = runs.split(chosen, planned)
    assert sorted(training.ids + held_out.ids) == sorted(f"w{i}" for i in range(20))
    assert (tuple(held_out.ids), len(training) + len(held_out)) == (planned.held_out, planned.works)
    known, unseen = ({artists[id] for id in side.ids if id in artists} for side in (training, held_out))
    assert known | unseen == {f"Artist {i}" for i in range(5)}
    assert known
    assert unseen
    assert not known & unseen
    assert runs.load(chosen, planned).cache.ids == training.ids
    assert runs.plan(chosen) == planned


def test_the_job_says_what_whole_artists_came_to(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(settings: Settings, planned: runs.Plan) -> None:
        raise InterruptedError("here training would begin")

    signed(settings, {f"w{i}": "Agnes Martin" if i < 12 else "Ad Reinhardt" for i in range(20)})
    monkeypatch.setattr("ray_jobs.train.fit", fit)
    said = []
    for by in ("work", "artist"):
        with pytest.raises(InterruptedError):
            jobs.run(trained(settings, split_by=by))
        said.append(capsys.readouterr().out)
    assert said[0] == ""
    assert said[1].startswith(("train: 40.0% of 20 works are held out", "train: 60.0% of 20 works are held out"))


def test_another_artist_on_the_other_side_is_another_run(settings: Settings) -> None:
    chosen, artists = trained(settings, split_by="artist"), {f"w{i}": f"Artist {i % 5}" for i in range(20)}
    signed(settings, artists)
    planned, by_work = runs.plan(chosen), runs.plan(settings)
    signed(settings, {**artists, "not encoded": "Artist 0"})
    assert runs.plan(chosen) == planned
    moved = planned.held_out[0]
    signed(settings, {**artists, moved: next(artist for id, artist in artists.items() if id not in planned.held_out)})
    assert moved not in runs.plan(chosen).held_out
    assert runs.plan(chosen).name != planned.name
    assert runs.plan(settings) == by_work  # the hash of the id alone


def test_duplicates_are_removed_before_works_are_split(settings: Settings) -> None:
    signed(settings, {f"w{i}": "Agnes Martin" if i else "Ad Reinhardt" for i in range(20)})
    chosen, dataset = trained(settings, split_by="artist"), Dataset(settings.dataset)
    assert {len(runs.plan(chosen).held_out)} <= {1, 19}
    again = {"id": "w0", "duplicate_of": "w1", "kind": "near", "distance": 2, "correlation": 0.99}
    dataset.publish(replace(dataset.latest(), duplicates=(dataset.put_rows("duplicates", [again], DUPLICATES),)))
    with pytest.raises(ValueError, match=r"train.split_by=artist: all 19 works are by Agnes Martin"):
        runs.plan(chosen)
    assert runs.plan(settings).works == 19


def test_shell_settings_are_settings() -> None:
    assert set(config.Train.model_fields) >= runs.SHELL_SETTINGS


def test_without_latents_the_encode_job_is_named(settings: Settings) -> None:
    other = settings.model_copy(update={"encode": config.Encode(resolution_px=64)})
    with pytest.raises(ValueError, match=r"holds no latents of encoder [0-9a-f]{12}: run the encode job first.* python -m"):
        runs.plan(other)


def test_a_loaded_run_is_the_training_half(settings: Settings) -> None:
    planned = runs.plan(settings)
    training, held_out = runs.split(settings, planned)
    assert len(training) + len(held_out) == 20
    loaded = runs.load(settings, planned)
    assert loaded.cache.ids == training.ids
    assert loaded.provenance["tables"] == list(planned.tables)
