"""An early stop beside a run that keeps few checkpoints, some of which are deleted while somebody looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from momalisa import checkpoint as checkpoints
from momalisa import promotion
from momalisa.checkpoint import Checkpoint
from momalisa.checkpoint.retention import forget, retain
from momalisa.config import Settings
from momalisa.promotion import measure
from momalisa.promotion.panel import Panel
from momalisa.storage import Store
from momalisa.training.watch import EarlyStop
from tests.promotion.conftest import Museum

TWENTY = "checkpoints/run/000000020"


def patient(settings: Settings, checkpoints: int) -> Settings:
    return settings.model_copy(update={"train": settings.train.model_copy(update={"early_stop_patience": checkpoints})})


def write(settings: Settings, folder: Path, images_seen: int, scale: float) -> None:
    """A checkpoint that is the further from the base the larger the scale, and so the worse."""
    unet = checkpoints.load_base_unet(settings.diffusion)
    for value in unet.conv_out.parameters():
        value.data.mul_(scale)
    checkpoints.save_weights(unet, folder, lora=False)
    entry = Checkpoint(f"checkpoints/run/{images_seen:09d}", "run", images_seen, settings.diffusion.model_dump(), {})
    checkpoints.write(Store(settings.root), entry, folder)


def test_a_rising_loss_stops_a_run_that_keeps_fewer_checkpoints_than_its_patience(
    museum: Museum, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, planned = museum
    store, stop, said = Store(settings.root), EarlyStop(patient(settings, 3), planned), []
    for images in (20, 30, 40, 50):
        if images > 20:
            write(settings, tmp_path / f"unet-{images}", images, 2.0 * images)
        retain(store, "run", keep_states=1, keep_weights=2)
        said.append(stop(images))
    assert said == [False, False, True, True]
    assert [one.images_seen for one in checkpoints.read_all(store, "run")] == [10, 40, 50]  # the best so far, and two
    again = EarlyStop(patient(settings, 3), planned)  # the run was resumed
    assert again.losses(50) == stop.losses(50) == sorted(stop.losses(50))
    assert len(again.losses(50)) == 5
    assert again.losses(40) == again.losses(50)[:4]  # what an earlier, longer life of the run had measured is not its past
    assert "not improved for 3 checkpoints" in capsys.readouterr().out


def test_a_checkpoint_that_goes_between_listing_and_measuring_is_one_less(
    museum: Museum, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, planned = museum
    listed = checkpoints.read_all

    def outlived(store: Store, run: str) -> list[Checkpoint]:
        found = listed(store, run)
        forget(store, found[0])
        return found

    found = promotion.candidates(settings, planned)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "read_all", outlived)
        assert len(EarlyStop(patient(settings, 1), planned).losses(20)) == 1
    worse = settings.model_copy(update={"promote": settings.promote.model_copy(update={"allow_worse": True})})
    decision = Panel(worse, planned, found).decide()  # listed before
    assert list(decision.broken) == ["run@10"]
    assert decision.best is not None
    assert decision.best.name == "run@20"
    assert "run@10 is passed over" in capsys.readouterr().out
    for gone in (measure.known, measure.measured):
        assert "holds no complete checkpoint" in (gone(settings, planned, found[0].path, measure.LOSSES) or {})["error"]


def test_a_checkpoint_that_goes_while_it_is_measured_leaves_its_losses(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, planned = museum
    store, load = Store(settings.root), measure.load

    def loaded(settings: Settings, path: str | None) -> measure.Model:
        model = load(settings, path)
        forget(store, checkpoints.read(store, TWENTY))
        return model

    monkeypatch.setattr(measure, "load", loaded)
    found = measure.measured(settings, planned, TWENTY, measure.LOSSES)
    assert measure.mean_losses(settings, planned) == {20: pytest.approx(sum(found["held_out"]) / 5)}


def test_losses_by_other_rules_are_not_compared(museum: Museum) -> None:
    settings, planned = museum
    measure.measured(settings, planned, TWENTY, measure.LOSSES)
    measure.measured(settings, planned, None, measure.LOSSES)
    finer = settings.model_copy(update={"promote": settings.promote.model_copy(update={"timesteps": 3})})
    assert list(measure.mean_losses(settings, planned)) == [20]
    assert measure.mean_losses(finer, planned) == {}


def test_what_cannot_be_measured_stops_nothing_and_is_said_once(
    museum: Museum, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, planned = museum
    stop = EarlyStop(patient(settings, 1), planned)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "load", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        assert [stop(20), stop(20)] == [False, False]
    assert capsys.readouterr().out.count("train: no early stop for now (RuntimeError: out of memory); going on") == 1
    assert stop(20)  # the second is worse than the first
