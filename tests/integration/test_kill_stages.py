"""Collect, caption and encode, each killed up to five times: the same version as undisturbed, hardly anything done twice."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from aiohttp import web

from momalisa.dataset import Dataset
from momalisa.miniature.wing import application, serve_in_thread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

HOME = Path(__file__).parents[2]
STAGES = {"collect": "images", "caption": "captions", "encode": "latents"}
KILLS, LANDED = 5, 3  # that are tried, and that must come before a stage is done
BLOCK = 4
SETTINGS = [f"--collect.block_size={BLOCK}", "--collect.tasks=1", "--caption.batch=2", "--encode.batch=2"]


def start(stage: str, root: Path, address: str, log: Path) -> subprocess.Popen[bytes]:
    where = [f"--root={root}", f"--collect.source.location={address}/collection.csv"]
    command = [sys.executable, "-m", f"ray_jobs.{stage}", "--config", str(HOME / "configs" / "demo.yaml"), *where, *SETTINGS]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    environment.pop("RAY_ADDRESS", None)
    with open(log, "ab") as file:
        return subprocess.Popen(command, cwd=HOME, env=environment, stdout=file, stderr=file, start_new_session=True)


def tables(root: Path, stage: str) -> dict[Path, int]:
    """When each table of a stage was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in (root / "dataset" / STAGES[stage]).rglob("*.parquet")}


def again(before: dict[Path, int], now: dict[Path, int]) -> int:
    """Tables that were there and have been written once more."""
    return sum(now[path] != written for path, written in before.items())


def published(root: Path, stage: str) -> bool:
    families = Dataset(f"{root}/dataset").latest().families()
    return any(paths for folder, paths in families.items() if folder.partition("/")[0] == STAGES[stage])


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


class Museum(NamedTuple):
    """The wing, and how often each picture was asked for."""

    address: str
    asked: Counter[str]


@pytest.fixture(scope="module")
def museum() -> Iterator[Museum]:
    asked: Counter[str] = Counter()

    @web.middleware
    async def count(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        asked[request.path] += request.path.startswith("/media/")
        return await handler(request)

    app = application()
    app.middlewares.append(count)
    with serve_in_thread(app) as address:
        yield Museum(address, asked)


def finish(stage: str, root: Path, address: str, log: Path) -> None:
    process = start(stage, root, address, log)
    try:
        assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    finally:
        everything(process)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, museum: Museum) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    for stage in STAGES:
        finish(stage, root, museum.address, root / "log")
    return root


def test_kills_change_nothing_and_cost_at_most_a_block_each(undisturbed: Path, tmp_path: Path, museum: Museum) -> None:
    """The whole job is killed four times, at a random table, and once one of its workers or its node."""
    root, log, rng = tmp_path / "killed", tmp_path / "log", random.Random(1929)
    asked_once = museum.asked.total()
    museum.asked.clear()
    for stage in STAGES:
        whole, landed, redone = len(tables(undisturbed, stage)), 0, 0
        for kill in range(KILLS):
            before = tables(root, stage)
            wanted = rng.randint(1, max(1, (whole - len(before)) // (KILLS - kill + 1)))
            process = start(stage, root, museum.address, log)
            while len(tables(root, stage).items() - before.items()) < wanted and process.poll() is None:
                time.sleep(0.01)
            if kill == KILLS - 1:
                for victim in offspring(process, "actor" if stage == "caption" else "node")[:1]:
                    victim.kill()
                time.sleep(2)
            everything(process)
            redone += again(before, tables(root, stage))
            if published(root, stage):
                break  # it was quicker than the kill
            landed += 1
        before = tables(root, stage)
        finish(stage, root, museum.address, log)
        redone += again(before, tables(root, stage))
        assert landed >= LANDED, stage
        assert redone <= landed, (stage, redone, landed)
        if stage == "collect":
            assert museum.asked.total() <= asked_once + BLOCK * landed
        assert remembered(root) == 0
    ours, theirs = (Dataset(f"{place}/dataset").latest() for place in (root, undisturbed))
    assert ours == theirs
    assert ours.sha256 == theirs.sha256


def test_an_actor_that_dies_is_replaced_and_the_job_goes_on(undisturbed: Path, tmp_path: Path, museum: Museum) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    shutil.copytree(undisturbed, root, ignore=shutil.ignore_patterns("captions", "latents"))
    collected = Dataset(f"{root}/dataset")
    collected.publish(replace(collected.latest(), captions={}, latents={}))
    process = start("caption", root, museum.address, log)
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
