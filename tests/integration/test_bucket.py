"""Collect, caption and encode straight from a bucket into a bucket, with no local copy, through a storm."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from momalisa.dataset import Dataset
from momalisa.miniature.wing import further_works
from momalisa.records import OK
from momalisa.storage import Store
from tests.faulty import Faulty

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

HOME = Path(__file__).parents[2]
STAGES = ("collect", "caption", "encode")
WORKS = 10


@pytest.fixture
def museum(bucket: str, tmp_path: Path) -> str:
    """A prefix of a bucket with pictures, captions for people, and a file that is none."""
    store = Store(f"{bucket}/{uuid4().hex}")
    for number, (_, picture) in enumerate(further_works(WORKS)):
        path = tmp_path / f"{number}.png"
        picture.save(path)
        store.write_bytes(f"pictures/{number}.png", path.read_bytes())
        path.unlink()
    store.write_bytes("pictures/broken.png", b"no picture")
    return store.root


def job(stage: str, museum: str, scratch: Path, *more: str, patience_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """A stage as a program in an empty working folder, its temporary files there too; `patience_s`: of its driver's stores."""
    where = [f"--root={museum}/out", "--collect.source.kind=folder", f"--collect.source.location={museum}/pictures"]
    program = ["-m", f"ray_jobs.{stage}"]
    if patience_s is not None:
        changed = f"from momalisa.storage import Store; Store.patience_s = {patience_s}"
        program = ["-c", f"{changed}; from ray_jobs.{stage} import main; main()"]
    command = [sys.executable, *program, "--config", str(HOME / "configs" / "demo.yaml"), *where, *more]
    environment = {
        **os.environ,
        "PYTHONPATH": str(HOME),
        "RAY_worker_niceness": "0",
        "TMPDIR": str(scratch),
        "RAY_TMPDIR": "/tmp",
    }
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False, timeout=500)


@contextmanager
def storm(faulty: Faulty, seconds: float, after: int) -> Iterator[None]:
    """503 and 429, whatever is asked for, from the request after so many; it ends by itself."""
    faulty.calm_until, faulty.refused, faulty.mode = faulty.asked + after, 0, "storm"
    over = threading.Event()

    def end() -> None:
        while not faulty.refused and not over.wait(0.05):
            pass
        over.wait(seconds)
        faulty.mode = ""

    thread = threading.Thread(target=end)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def check(museum: str) -> str:
    """The version's hash, once it was looked at."""
    dataset = Dataset(f"{museum}/out/dataset")
    version = dataset.latest()
    rows = {row["id"]: row for row in dataset.rows(version.images, ["id", "status", "error"])}
    assert sum(row["status"] == OK for row in rows.values()) == WORKS
    assert len(rows) == WORKS + 1
    for tables in (*version.captions.values(), *version.latents.values()):
        assert sum(row["status"] == OK for row in dataset.rows(tables, ["status"])) == WORKS
    return version.sha256


def test_from_bucket_to_bucket_without_a_local_copy(museum: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for stage in STAGES:
        done = job(stage, museum, scratch)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    check(museum)
    assert not [path for path in scratch.rglob("*") if path.suffix in {".png", ".jpg", ".parquet"}]
    again = job("collect", museum, scratch)
    assert "nothing new" in again.stdout


@pytest.mark.slow
def test_of_two_runs_that_write_at_once_one_wins_and_the_other_says_so(museum: str, faulty: Faulty, tmp_path: Path) -> None:
    """They cut the works into other blocks, so their tables differ; each finds the dataset empty when it publishes."""
    faulty.mode = "race"
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(job, "collect", museum, tmp_path, f"--collect.block_size={size}") for size in (4, 6)]
        won, lost = sorted((run.result() for run in runs), key=lambda done: done.returncode)
    faulty.mode = ""
    assert (won.returncode, lost.returncode) == (0, 1), won.stderr[-2000:] + lost.stderr[-2000:]
    assert faulty.too_late, "the precondition decided nothing"
    said = lost.stderr.strip().splitlines()[-1]
    assert said.startswith(f"collect: {museum}/out/dataset: another run has collected {WORKS + 1} of these works in the meantime")
    assert said.endswith("nothing was published. Run again: what is there is passed by")
    version = check(museum)
    again = job("collect", museum, tmp_path, *lost.args[-1:])
    assert (again.returncode, again.stdout.splitlines()[-1].split(",")[1]) == (0, " 0 new"), again.stdout + again.stderr[-2000:]
    assert (check(museum), len(Dataset(f"{museum}/out/dataset").log())) == (version, 1)


@pytest.mark.slow
def test_a_minute_of_503_and_429_fails_no_stage(museum: str, faulty: Faulty, tmp_path: Path) -> None:
    for stage, after in (("collect", 0), ("caption", 12), ("encode", 24)):
        with storm(faulty, 60, after):
            done = job(stage, museum, tmp_path)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        assert faulty.refused > 10, f"{stage} asked too little to meet the storm"
    check(museum)


@pytest.mark.slow
def test_without_patience_a_storm_fails_a_stage_and_nothing_is_published(museum: str, faulty: Faulty, tmp_path: Path) -> None:
    with storm(faulty, 300, 0):
        done = job("collect", museum, tmp_path, patience_s=1)
    assert done.returncode != 0
    assert f"{museum}" in done.stderr
    assert "Nothing was published; run again" in done.stderr
    assert not Dataset(f"{museum}/out/dataset").log()
