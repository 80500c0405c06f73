"""Checkpoints beside training: what is written is said, whatever becomes of the older ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint
from momalisa.training import writer
from momalisa.training.loop import Events, Trainer
from tests.training.test_options import run_of


def test_what_is_written_is_said_although_the_older_ones_cannot_be_deleted(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError("objects may not be deleted here")

    monkeypatch.setattr(writer, "retain", refused)
    run, told = run_of(tiny_base, tmp_path), list[Checkpoint]()
    Trainer(run, Events(checkpointed=told.append)).train()
    assert [one.images_seen for one in told] == [one.images_seen for one in checkpoints.read_all(run.store, run.name)] == [8, 16]
    said = capsys.readouterr().out
    assert "older checkpoints could not be deleted (PermissionError: objects may not be deleted here)" in said
    assert "could not be written" not in said


def test_after_a_snapshot_that_could_not_be_written_the_next_one_has_its_memory(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At full size it is 13 GiB."""
    trainer = Trainer(run_of(tiny_base, tmp_path), Events())

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(writer, "save_trained", full)
    places = []
    for _ in range(2):
        snapshot = trainer.snapshot()
        places.append({name: value.data_ptr() for name, value in snapshot.state.items()})
        trainer.writer.submit(snapshot)
        trainer.writer.settle()
        assert trainer.writer.failure == "OSError: no space left"
    assert places[0] == places[1]
    with pytest.raises(OSError, match="could not be written: OSError: no space left; free space and start again"):
        trainer.writer.close()


def test_whoever_is_asked_to_stop_sees_the_checkpoint_before(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = run_of(tiny_base, tmp_path, images=32), []
    write = checkpoints.write

    def slow(*arguments: Any) -> Checkpoint:
        time.sleep(0.3)
        return write(*arguments)

    def stop(images_seen: int) -> bool:
        seen.append([one.images_seen for one in checkpoints.read_all(run.store, run.name)])
        return False

    monkeypatch.setattr(checkpoints, "write", slow)
    Trainer(run, Events(stop_due=stop)).train()
    assert seen == [[], [8], [8, 16]]
