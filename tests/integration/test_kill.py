"""A pipeline killed in the middle of training goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from momalisa.checkpoint import read_all
from momalisa.dataset import Dataset
from momalisa.miniature.wing import serve_in_thread
from momalisa.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HOME = Path(__file__).parents[2]
SMALL = [
    "--collect.source.limit=16",
    "--train.images=48",
    "--train.batch=4",
    "--train.warmup_images=4",
    "--train.checkpoint_every_images=8",
    "--train.evaluate_every_steps=1000",
    "--train.evaluation_prompts=[]",
    "--promote.distance_pictures=0",
    "--promote.gate_pictures=0",
    "--promote.general_pictures=0",
    "--promote.timesteps=2",
    "--promote.contact_prompts=[]",
    "--promote.allow_worse=true",
    "--wandb.mode=disabled",
]


def pipeline(root: Path, address: str, log: Path) -> subprocess.Popen[bytes]:
    """The pipeline as a program, in a session of its own so that it can be killed with all that it started."""
    where = [f"--root={root}", f"--collect.source.location={address}/collection.csv"]
    command = [sys.executable, "-m", "ray_jobs.pipeline", "--config", str(HOME / "configs" / "demo.yaml"), *where, *SMALL]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    environment.pop("RAY_ADDRESS", None)
    with open(log, "wb") as file:
        return subprocess.Popen(command, cwd=HOME, env=environment, stdout=file, stderr=file, start_new_session=True)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.wait(timeout=400) == 0, log.read_text()[-3000:]


def kill_once_trained(process: subprocess.Popen[bytes], root: Path, log: Path) -> None:
    """SIGKILL everything as soon as two checkpoints are published, and no more than that finished."""
    while len(list(root.glob("checkpoints/*/*/manifest.json"))) < 2:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_pipeline_ends_with_the_very_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    killed, undisturbed, log = tmp_path / "killed", tmp_path / "undisturbed", tmp_path / "log"
    with serve_in_thread() as address:
        process = pipeline(killed, address, log)
        kill_once_trained(process, killed, log)
        assert not (killed / "refs" / "best").exists()
        finish(pipeline(killed, address, log), log)
        finish(pipeline(undisturbed, address, log), log)
    assert Dataset(f"{killed}/dataset").latest().sha256 == Dataset(f"{undisturbed}/dataset").latest().sha256
    run = next((killed / "checkpoints").iterdir()).name
    ours, theirs = read_all(Store(str(killed)), run), read_all(Store(str(undisturbed)), run)
    assert [checkpoint.images_seen for checkpoint in ours] == [checkpoint.images_seen for checkpoint in theirs]
    assert ours[-1].files == theirs[-1].files  # sha256 of the EMA weights
    assert ours[-1].state == theirs[-1].state  # weights, EMA, optimizer, losses
