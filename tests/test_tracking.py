"""W&B and TensorBoard see the run, know no secrets, and are never in the way."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import struct
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from momalisa import config, tracking
from momalisa.config import Settings
from momalisa.storage import Store
from momalisa.tracking import Tracker


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads the environment once
    source = config.Source(kind="moma", location="https://curator:hunter2@museum.example/works.csv?signature=abc")
    return Settings(name="demo", root=str(tmp_path), collect=config.Collect(source=source))


BLOCK = 32_768  # of a LevelDB log: records of (crc, length, type) and data, none across the end of a block


def pieces(data: bytes) -> Iterator[bytes]:
    """The whole records of a .wandb file, which may grow yet: LevelDB's log format after 7 bytes of W&B's own."""
    assert b":W&B".startswith(data[:4])
    place, whole = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind not in (1, 2, 3, 4) or place + 7 + length > len(data):  # whole, first, middle, last
            return
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def records(root: Path) -> list[Any]:
    """What an offline run wrote, and `wandb sync` would bring to the server. W&B's own process writes it, up to the exit."""
    from wandb.proto import wandb_internal_pb2

    found: list[Any] = []
    for _ in range(300):
        paths = sorted(root.glob("wandb/offline-run-*/run-*.wandb"))
        found = [wandb_internal_pb2.Record.FromString(piece) for path in paths for piece in pieces(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            break
        time.sleep(0.1)
    return found


def history(found: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def to_send(found: list[Any]) -> dict[str, Path]:
    """What `wandb sync` would send of a run's artifacts: name -> file, each looked at where W&B wrote down that it is."""
    artifacts = [record.request.log_artifact.artifact for record in found if record.request.HasField("log_artifact")]
    artifacts += [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    entries = [entry for artifact in artifacts for entry in artifact.manifest.contents]
    for entry in entries:
        assert entry.digest == base64.b64encode(hashlib.md5(Path(entry.local_path).read_bytes()).digest()).decode(), entry.path
    return {entry.path: Path(entry.local_path) for entry in entries}


def follow(settings: Settings, folder: Path) -> None:
    tracker = Tracker(settings, "demo-1", "train")
    for images in (32, 64):
        tracker.log({"loss": 1.0 / images, "images_seen": images, "loss_t000_249": 0.5})
    tracker.pictures(64, ["a boat", "a tree"], [1000, 1001], [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")])
    tracker.dataset("f" * 64)
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"weights")
    tracker.artifact("demo", folder, {"checkpoint": "demo-1@64", "heldout_loss_best": 0.5}, alias="best")
    tracker.finish()


def test_without_a_key_everything_is_in_the_offline_run(settings: Settings, tmp_path: Path) -> None:
    follow(settings, tmp_path / "weights")
    found = records(tmp_path)
    rows = history(found)
    assert [(row["images_seen"], row["loss"]) for row in rows if "loss" in row] == [(32, 1 / 32), (64, 1 / 64)]
    assert rows[0]["loss_t000_249"] == 0.5
    (table,) = [row for row in rows if "evaluation/_type" in row]
    assert [table[f"evaluation/{key}"] for key in ("_type", "nrows", "ncols")] == ["table-file", 2, 4]
    assert table["images_seen"] == 64
    artifacts = [record.request.log_artifact.artifact for record in found if record.request.HasField("log_artifact")]
    artifacts += [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    by_type = {artifact.type: artifact for artifact in artifacts}
    assert by_type["dataset"].use_after_commit  # an input of the run: the first link of the lineage
    assert by_type["dataset"].name == "demo-dataset"
    assert json.loads(by_type["dataset"].metadata) == {"version": "f" * 64}
    assert set(by_type["model"].aliases) == {"best", "latest"}
    assert json.loads(by_type["model"].metadata)["checkpoint"] == "demo-1@64"
    everything = b"".join(record.SerializeToString() for record in found)
    assert b"museum.example/works.csv" in everything
    files = to_send(found)
    assert len(files) == 5  # a version, a model, a table and its pictures
    assert all(file.is_relative_to(tmp_path / "wandb") for file in files.values())
    assert b"hunter2" not in everything
    assert b"signature=abc" not in everything


def test_an_offline_run_beside_a_bucket_is_brought_there(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    root = f"memory://{uuid.uuid4().hex}/moma"
    follow(settings.model_copy(update={"root": root}), tmp_path / "weights")
    assert "WANDB_DATA_DIR" not in os.environ
    store = Store(root)
    (readme,) = (path for path in store.list("wandb/demo-1") if path.endswith("/README"))
    folder, name = readme.removesuffix("/README"), readme.split("/")[-2]
    here = tmp_path / "node"
    how = f"`mkdir -p {here} && gcloud storage cp -r {root}/{folder} {here} && wandb sync {here}/{name}/wandb/offline-run-"
    assert how in capsys.readouterr().out
    assert store.read_bytes(readme).decode().startswith(how)
    assert not list(here.glob("momalisa-wandb-*"))
    shutil.rmtree(here)  # the node is given back; another machine does as it is told
    for path in store.list(folder):
        copy = here / name / path.removeprefix(f"{folder}/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(store.read_bytes(path))
    found = records(here / name)
    assert [row["images_seen"] for row in history(found) if "loss" in row] == [32, 64]
    assert any(record.WhichOneof("record_type") == "exit" for record in found)  # whole when it was brought
    assert set(to_send(found)) >= {"weights.bin", "version.txt", "evaluation.table.json"}
    assert sum(path.startswith("media/images/") for path in to_send(found)) == 2
    (table,) = (row["evaluation/path"] for row in history(found) if "evaluation/path" in row)
    assert list((here / name).glob(f"wandb/offline-run-*/files/{table}"))


@pytest.mark.parametrize("breaks", ["nothing", "init", "define_metric", "finish"])
def test_a_run_beside_a_bucket_leaves_nothing_here_but_what_it_could_not_send(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], breaks: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TimeoutError("no answer")

    if breaks == "init":
        monkeypatch.setattr(wandb, "init", broken)
    elif breaks != "nothing":
        monkeypatch.setattr(wandb.Run, breaks, broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", "/where/it/was")
    mode = config.Wandb(mode="disabled" if breaks == "nothing" else "offline")
    tracker = Tracker(settings.model_copy(update={"root": f"memory://{uuid.uuid4().hex}/moma", "wandb": mode}), "demo-1", "train")
    tracker.log({"loss": 1.0, "images_seen": 32})
    tracker.finish()
    assert os.environ["WANDB_DATA_DIR"] == "/where/it/was"
    monkeypatch.undo()
    said = "W&B cannot follow: TimeoutError: no answer; going on without" in capsys.readouterr().out
    assert said == (breaks != "nothing")
    wandb.teardown()
    assert len(list(tmp_path.glob("momalisa-wandb-*"))) == (breaks == "finish")


def test_a_server_that_does_not_answer_means_offline_and_one_message(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]  # nobody listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    wandb.teardown()
    hasty = settings.model_copy(update={"wandb": config.Wandb(connect_timeout_s=3)})
    assert tracking.mode(hasty) == "online"
    follow(hasty, tmp_path / "weights")
    said = capsys.readouterr().out
    assert said.count(f"http://127.0.0.1:{port} cannot be used") == 1
    assert "going on offline" in said
    assert "wandb sync" in said
    rows = history(records(tmp_path))
    assert [row["images_seen"] for row in rows if "loss" in row] == [32, 64]


def test_what_breaks_in_tracking_is_said_once(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(settings.model_copy(update={"wandb": config.Wandb(mode="disabled")}), "demo-1", "train")

    def broken(metrics: dict[str, float]) -> None:
        raise OSError("the disk is full")

    tracker._wandb.log = broken
    for images in (1, 2, 3):
        tracker.log({"loss": 1.0, "images_seen": images})
    tracker.finish()
    assert capsys.readouterr().out.count("W&B cannot follow: OSError: the disk is full; going on without") == 1


def test_tensorboard_is_an_alternative(settings: Settings, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = settings.model_copy(update={"wandb": config.Wandb(mode="disabled", tensorboard=True)})
    follow(chosen, tmp_path / "weights")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "demo-1"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(32, pytest.approx(1 / 32)), (64, 1 / 64)]
    assert "images_seen" not in events.Tags()["scalars"]
    assert set(events.Tags()["images"]) == {"a boat", "a tree"}
    assert not (tmp_path / "wandb").exists()


def test_without_the_package_the_way_out_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    chosen = settings.model_copy(update={"wandb": config.Wandb(mode="disabled", tensorboard=True)})
    with pytest.raises(ValueError, match=r"pip install 'momalisa\[tensorboard\]'"):
        Tracker(chosen, "demo-1", "train")
