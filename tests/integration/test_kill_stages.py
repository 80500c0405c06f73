"""Collect, caption and encode, each killed five times: the same version as undisturbed, and hardly anything done twice."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from momalisa.dataset import Dataset
from momalisa.miniature.wing import serve_in_thread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

HOME = Path(__file__).parents[2]
STAGES = {"collect": "images", "caption": "captions", "encode": "latents"}
KILLS = 5
SETTINGS = ["--collect.block_size=8", "--collect.tasks=1", "--caption.batch=2", "--encode.batch=2"]


def start(stage: str, root: Path, address: str, log: Path) -> subprocess.Popen[bytes]:
    where = [f"--root={root}", f"--collect.source.location={address}/collection.csv"]
    command = [sys.executable, "-m", f"ray_jobs.{stage}", "--config", str(HOME / "configs" / "demo.yaml"), *where, *SETTINGS]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    environment.pop("RAY_ADDRESS", None)
    with open(log, "ab") as file:
        return subprocess.Popen(command, cwd=HOME, env=environment, stdout=file, stderr=file, start_new_session=True)


def tables(root: Path, stage: str) -> int:
    return len(list((root / "dataset" / STAGES[stage]).rglob("*.parquet")))


def remembered(root: Path) -> int:
    return len(list((root / "dataset" / "drafts").rglob("*.json")))


def offspring(process: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
    """The processes of a job's Ray of one kind: `raylet` (the node) or the workers of a model or task."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if (kind == "node" and "raylet/raylet" in title) or (kind == "actor" and re.match(r"ray::(Map|store_block)", title)):
            found.append(child)
    return found


def everything(process: subprocess.Popen[bytes]) -> None:
    """The driver, and all that it started: Ray's processes leave its session, so they are found by descent."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve_in_thread() as address:
        yield address


def finish(stage: str, root: Path, address: str, log: Path) -> None:
    process = start(stage, root, address, log)
    try:
        assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    finally:
        everything(process)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, address: str) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    for stage in STAGES:
        finish(stage, root, address, root / "log")
    return root


def test_five_kills_a_stage_change_nothing(undisturbed: Path, tmp_path: Path, address: str) -> None:
    """The whole job is killed four times, at a random table, and once one of its workers or its node."""
    root, log, rng = tmp_path / "killed", tmp_path / "log", random.Random(1929)
    whole = {stage: tables(undisturbed, stage) for stage in STAGES}
    for stage in STAGES:
        redone = 0
        for kill in range(KILLS):
            process = start(stage, root, address, log)
            begun = remembered(root)
            wanted = min(begun + rng.randint(1, 3), whole[stage] - 1)
            while tables(root, stage) < wanted and process.poll() is None:
                time.sleep(0.01)
            if kill == KILLS - 1:
                for victim in offspring(process, "actor" if stage == "caption" else "node")[:1]:
                    victim.kill()
                time.sleep(2)
            everything(process)
            redone += tables(root, stage) - remembered(root) if remembered(root) else 0
            if Dataset(f"{root}/dataset").latest().families().get(STAGES[stage]):
                break  # it was quicker than the kill
        assert redone <= KILLS, (stage, redone)
        finish(stage, root, address, log)
        assert remembered(root) == 0
    ours, theirs = (Dataset(f"{place}/dataset").latest() for place in (root, undisturbed))
    assert ours == theirs
    assert ours.sha256 == theirs.sha256


def test_an_actor_that_dies_is_replaced_and_the_job_goes_on(undisturbed: Path, tmp_path: Path, address: str) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    finish("collect", root, address, log)
    process = start("caption", root, address, log)
    try:
        while not tables(root, "caption") and process.poll() is None:
            time.sleep(0.01)
        victims = offspring(process, "actor")
        assert victims, "no actor was found to kill"
        for victim in victims:
            victim.kill()
        assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    finally:
        everything(process)
    assert Dataset(f"{root}/dataset").latest().captions == Dataset(f"{undisturbed}/dataset").latest().captions
