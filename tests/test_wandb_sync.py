"""What the tracker tells W&B arrives at a server: by `wandb sync`, live, and after the server or the run was gone."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from PIL import Image
from wandb.proto import wandb_internal_pb2

from momalisa import config, tracking
from momalisa.config import Settings
from momalisa.tracking import Tracker
from tests.test_tracking import history, pieces
from tests.wandb_server import Artifact, WandbServer

KEY = "0123456789abcdef" * 2 + "01234567"
VERSION = "f" * 64
PICTURES = [Image.linear_gradient("L").resize((8, 8)).convert("RGB"), Image.new("RGB", (8, 8), "blue")]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """Which refused nothing and was told no secret; and W&B's own process, which has ended."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")  # its process lives on for a while after a kill
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")  # in whole seconds
    monkeypatch.setattr(tracking, "FLUSH_S", 0.5)
    monkeypatch.chdir(tmp_path)  # where `wandb sync` writes its logs
    wandb.teardown()  # it reads the environment once
    server = WandbServer(KEY)
    server.start()
    yield server
    server.mode = ""
    server.start()  # where a test has not come so far: else W&B's process would wait for it
    wandb.teardown()
    server.stop()
    assert server.refused == []
    for secret in (KEY, "hunter2", "signature=abc"):
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        assert not [body for body in server.bodies if secret.encode() in body]
    assert not [core for core in psutil.Process().children(recursive=True) if core.name() == "wandb-core"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    source = config.Source(kind="moma", location="https://curator:hunter2@museum.example/works.csv?signature=abc")
    return Settings(
        name="demo",
        root=str(tmp_path / "root"),
        collect=config.Collect(source=source),
        wandb=config.Wandb(connect_timeout_s=120),
    )


def online(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def shell(server: WandbServer, command: str) -> str:
    """What a line says on a machine that has the key."""
    key = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    environment = os.environ | key | {"PATH": f"{os.environ['PATH']}:{Path(sys.executable).parent}"}
    done = subprocess.run(["bash", "-ec", command], env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert KEY not in done.stdout + done.stderr
    return done.stdout + done.stderr


def until(true: Callable[[], Any]) -> None:
    for _ in range(2400):
        if true():
            return
        time.sleep(0.05)
    raise TimeoutError("it did not come true")


def begin(settings: Settings) -> Tracker:
    tracker = Tracker(settings, "demo-1", "train")
    tracker.log({"loss": 1 / 32, "images_seen": 32})
    return tracker


def go_on(tracker: Tracker, folder: Path) -> None:
    tracker.log({"loss": 1 / 64, "images_seen": 64})
    tracker.pictures(64, ["a boat", "a tree"], [1000, 1001], PICTURES)
    tracker.dataset(VERSION)
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"weights")
    tracker.artifact("demo", folder, {"checkpoint": "demo-1@64"}, alias="best")


def arrived(server: WandbServer, weights: Path) -> None:
    """All that `begin` and `go_on` tell is there, whole."""
    (run,) = server.runs.values()
    assert (run.project, run.name, run.display_name, run.job_type, run.exit_code) == (
        "momalisa",
        "demo-1-train",
        "demo-1",
        "train",
        0,
    )
    rows = {row["_step"]: row for row in run.history}
    assert [(row["images_seen"], row["loss"]) for row in rows.values() if "loss" in row] == [(32, 1 / 32), (64, 1 / 64)]
    assert run.config["collect"]["value"]["source"]["location"] == "https://***@museum.example/works.csv?signature=***"
    assert run.config["dataset_version"] == {"value": VERSION}
    metrics = {metric.get("1", metric.get("2")): metric.get("5") for metric in run.config["_wandb"]["value"]["m"]}
    assert metrics == {"images_seen": None, "*": 1}  # the first metric is the axis of all
    found = {artifact.type: artifact for artifact in server.artifacts.values()}
    assert all(artifact.committed for artifact in found.values())  # their files are what their digests say
    assert found["model"].files == {"weights.bin": weights.read_bytes()}  # which W&B has not deleted
    assert (found["model"].metadata, found["model"].aliases) == ({"checkpoint": "demo-1@64"}, {"best", "latest"})
    assert found["dataset"].metadata == {"version": VERSION}
    assert run.uses == {found["dataset"].id}  # the first link of the lineage
    (shown,) = [row["evaluation"] for row in rows.values() if "evaluation" in row]
    assert shown["artifact_path"] == f"wandb-client-artifact://{found['run_table'].client}/evaluation.table.json"
    assert_pictures(found["run_table"])
    assert shown["path"] in run.files


def assert_pictures(table: Artifact) -> None:
    rows = json.loads(table.files["evaluation.table.json"])["data"]
    assert [row[:3] for row in rows] == [[64, "a boat", 1000], [64, "a tree", 1001]]
    for row, picture in zip(rows, PICTURES, strict=True):
        with Image.open(io.BytesIO(table.files[row[3]["path"]])) as there:
            assert there.tobytes() == picture.tobytes()


def test_an_offline_run_is_brought_there_later(server: WandbServer, settings: Settings, tmp_path: Path) -> None:
    tracker = begin(settings)
    go_on(tracker, tmp_path / "weights")
    tracker.finish()
    wandb.teardown()  # as at a job's end
    assert server.runs == {}
    said = shell(server, f"wandb sync {settings.root}/wandb/offline-run-*")
    assert "Finished syncing" in said
    arrived(server, tmp_path / "weights" / "weights.bin")
    assert "Skipped 1 synced run(s)" in shell(server, f"wandb sync {settings.root}/wandb/offline-run-*")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's temporary folder, and a `gcloud` that copies from a bucket that is a folder."""
    for name in ("node", "bin"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.write_text('#!/bin/sh\ntest "$1 $2 $3" = "storage cp -r" && exec cp -r "${4#file://}" "$5"\n')
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return tmp_path / "node"


def test_from_a_bucket_as_its_readme_says(server: WandbServer, settings: Settings, tmp_path: Path, node: Path) -> None:
    tracker = begin(settings.model_copy(update={"root": f"file://{tmp_path}/bucket"}))
    go_on(tracker, tmp_path / "weights")
    tracker.finish()
    shutil.rmtree(node)  # it is given back
    (readme,) = (tmp_path / "bucket" / "wandb" / "demo-1").glob("*/README")
    shell(server, readme.read_text().strip("`\n"))
    arrived(server, tmp_path / "weights" / "weights.bin")


def test_online_it_arrives_live(
    server: WandbServer, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    online(server, monkeypatch)
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/of/a/program/that/has/ended")
    tracker = begin(settings)
    until(lambda: server.runs["demo-1-train"].history)
    go_on(tracker, tmp_path / "weights")
    until(lambda: [one for one in server.artifacts.values() if one.type == "model" and one.committed])
    tracker.finish()
    arrived(server, tmp_path / "weights" / "weights.bin")
    said = capfd.readouterr()
    assert KEY not in said.out + said.err
    assert "W&B" not in said.out


SLOW = [pytest.param("silent", "root", marks=pytest.mark.slow), pytest.param("failing", "bucket", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("fault", "beside"), [("gone", "root"), *SLOW])
def test_a_server_that_dies_stops_nothing_and_gets_it_all_later(
    server: WandbServer,
    settings: Settings,
    tmp_path: Path,
    node: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    beside: str,
) -> None:
    online(server, monkeypatch)
    monkeypatch.setattr(tracking, "FINISH_S", 3.0)
    if beside == "bucket":
        settings = settings.model_copy(update={"root": f"file://{tmp_path}/bucket"})
    tracker = begin(settings)
    until(lambda: server.runs["demo-1-train"].history)
    server.mode = fault
    if fault == "gone":
        server.stop()
    go_on(tracker, tmp_path / "weights")  # W&B's own way waits for the server, without end for the dataset
    tracker.finish()
    assert (len(server.runs["demo-1-train"].history), len(server.artifacts)) == (1, 0)
    said = capsys.readouterr().out
    assert "W&B cannot follow: TimeoutError: not all of the run was sent, with 3 s at the end for it" in said
    server.mode = ""
    if fault == "gone":
        server.start()
    if beside == "bucket":
        shutil.rmtree(node)
    (command,) = re.findall("later with `(.* wandb sync --include-online .*|wandb sync --include-online .*)`", said)
    assert "Finished syncing" in shell(server, command)
    arrived(server, tmp_path / "weights" / "weights.bin")


def test_what_wandb_has_on_disk_is_kept_where_its_process_is_killed(
    server: WandbServer,
    settings: Settings,
    tmp_path: Path,
    node: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    online(server, monkeypatch)
    tracker = begin(settings.model_copy(update={"root": f"file://{tmp_path}/bucket"}))
    (folder,) = node.iterdir()
    until(lambda: kept(str(folder)) == [32])
    for core in psutil.Process().children(recursive=True):
        if core.name() == "wandb-core":
            core.kill()
    tracker.finish()
    (command,) = re.findall("later with `(mkdir .*)`", capsys.readouterr().out.splitlines()[-1])
    assert not folder.exists()
    shell(server, command)
    assert 32 in came(server)


@pytest.mark.slow
def test_a_model_is_waited_for_by_its_size(
    server: WandbServer,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    online(server, monkeypatch)
    monkeypatch.setattr(tracking, "FINISH_S", 0.5)
    monkeypatch.setattr(tracking, "UPLOAD_BYTES_PER_S", len(b"weights") / 20)
    tracker = begin(settings)
    server.mode = "failing"
    go_on(tracker, tmp_path / "weights")
    back = threading.Timer(2, lambda: setattr(server, "mode", ""))
    back.start()
    tracker.finish()
    back.join()
    arrived(server, tmp_path / "weights" / "weights.bin")
    assert capsys.readouterr().out == ""


JOB = """
import sys
from momalisa import config, tracking

tracking.FLUSH_S, tracking.FINISH_S = 0.5, 3.0
root, first, last, ending = sys.argv[1:]
tracker = tracking.Tracker(config.Settings(name="demo", root=root, wandb=config.Wandb(connect_timeout_s=120)), "demo-1", "train")
for images in range(int(first), int(last) + 1):
    tracker.log({"loss": 1 / images, "images_seen": images})
if ending == "finish":
    tracker.finish()
else:
    sys.stdin.readline()
"""


def kept(root: str) -> list[Any]:
    """The images of the metrics that are on disk."""
    paths = sorted(Path(root).glob("wandb/*run-2*/*.wandb"))
    found = [wandb_internal_pb2.Record.FromString(piece) for path in paths for piece in pieces(path.read_bytes())]
    return [row["images_seen"] for row in history(found)]


def came(server: WandbServer) -> list[Any]:
    """The images of the metrics that the server has."""
    return [row["images_seen"] for run in server.runs.values() for row in run.history]


def cores(pid: int) -> list[psutil.Process]:
    """W&B's own processes, begun by that one."""
    return [core for core in psutil.process_iter(["cmdline"]) if str(pid) in (core.info["cmdline"] or [])]


@pytest.mark.parametrize("how", ["offline", "online"])
def test_a_killed_run_goes_on_as_the_same_run(
    server: WandbServer, settings: Settings, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "online":
        online(server, monkeypatch)
    job = [sys.executable, "-c", JOB, settings.root]
    with subprocess.Popen(
        [*job, "1", "3", "wait"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as killed:
        until(lambda: (came(server) if how == "online" else kept(settings.root)) == [1, 2, 3])
        killed.kill()
    until(lambda: not cores(killed.pid))
    subprocess.run([*job, "3", "5", "finish"], check=True, capture_output=True, timeout=200)
    if how == "offline":
        assert len(re.findall("Finished syncing", shell(server, f"wandb sync {settings.root}/wandb/offline-run-*"))) == 2
    (run,) = server.runs.values()
    assert came(server) == [1, 2, 3, 3, 4, 5]
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3, 4, 5]
    assert (run.name, run.exit_code) == ("demo-1-train", 0)


@pytest.mark.slow
def test_a_run_that_nobody_finishes_ends_without_its_server(
    server: WandbServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(server, monkeypatch)
    job = [sys.executable, "-c", JOB, settings.root, "1", "3", "wait"]
    with subprocess.Popen(job, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as left:
        until(lambda: came(server) == [1, 2, 3])
        server.stop()
        try:
            left.communicate(b"\n", timeout=60)
        finally:
            left.kill()
    assert left.returncode == 0
    assert not cores(left.pid)
    server.start()
