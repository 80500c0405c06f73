"""Collect, caption and encode straight from a bucket into a bucket, with no local copy, through a storm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from momalisa.dataset import Dataset
from momalisa.miniature.wing import further_works
from momalisa.records import OK
from momalisa.storage import Store

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


def job(stage: str, museum: str, scratch: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A stage as a program in an empty working folder, its temporary files there too."""
    where = [f"--root={museum}/out", "--collect.source.kind=folder", f"--collect.source.location={museum}/pictures"]
    command = [sys.executable, "-m", f"ray_jobs.{stage}", "--config", str(HOME / "configs" / "demo.yaml"), *where, *more]
    environment = {
        **os.environ,
        "PYTHONPATH": str(HOME),
        "RAY_worker_niceness": "0",
        "TMPDIR": str(scratch),
        "RAY_TMPDIR": "/tmp",
    }
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False, timeout=500)


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
