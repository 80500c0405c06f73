"""Planted secrets are in nothing that a miniature run writes, in nothing that is committed, and in no manifest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from momalisa.miniature.wing import serve_in_thread
from tests.deploy.namespaces import HOME
from tests.integration.test_kill import SMALL

PLANTED = {
    "RUNPOD_API_KEY": "rpa_planted-aaaaaaaaaaaaaaaa",
    "RAY_AUTH_TOKEN": "planted-bbbbbbbbbbbbbbbbbbbbbb",
    "WANDB_API_KEY": "planted" + "c" * 33,
    "GOOGLE_CREDENTIALS_JSON": '{"private_key": "planted-dddddddddddd"}',
    "REDIS_PASSWORD": "planted-eeeeeeeeeeeeeeeeeee",
}
KEY_SHAPES = re.compile(
    rb"rpa_[A-Z0-9]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----|hf_[A-Za-z0-9]{30,}"
    rb"|AIza[0-9A-Za-z_-]{35}|ghp_[0-9A-Za-z]{36}"
)


def test_nothing_committed_looks_like_a_key() -> None:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=HOME, capture_output=True, check=True).stdout.decode().split("\0")
    assert [name for name in names if name and (HOME / name).is_file() and KEY_SHAPES.search((HOME / name).read_bytes())] == []


def test_no_manifest_gives_a_secret_a_value() -> None:
    files = [HOME / "cluster.yaml", HOME / "runtime_env.yaml", *(HOME / "deploy").rglob("*.yaml")]
    for file in files:
        for name in PLANTED:
            for value in re.findall(rf"^\s*{name}: *(.*)$", file.read_text(), re.MULTILINE):
                assert value.startswith("${"), f"{file.name}: {name} has a value"


@pytest.fixture
def work() -> Iterator[Path]:
    """Where Ray writes its logs; its sockets want a short path."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_miniature_run_writes_no_secret_anywhere(tmp_path: Path, work: Path) -> None:
    root = tmp_path / "out"
    with serve_in_thread() as address:
        source = f"--collect.source.location={address.replace('://', '://visitor:planted-ffffffff@')}/collection.csv"
        small = [option for option in SMALL if not option.startswith("--wandb")]
        command = [sys.executable, "-m", "ray_jobs.pipeline", "--config", "configs/demo.yaml", f"--root={root}", source, *small]
        environment = {
            **os.environ,
            **PLANTED,
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "disabled",
            "WANDB_MODE": "offline",
            "RAY_TMPDIR": str(work),
            "MOMALISA_RUNPOD_URL": "http://127.0.0.1:9",
        }
        environment.pop("RAY_ADDRESS", None)
        done = subprocess.run(
            [*command, "--wandb.mode=offline"], cwd=HOME, env=environment, capture_output=True, check=False, timeout=380
        )
        listing = subprocess.run(
            [sys.executable, "-m", "deploy.runpod", "ls"],
            cwd=HOME,
            env={**environment, "RUNPOD_API_KEY": ""},
            capture_output=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    texts = {"stdout": done.stdout + listing.stdout, "stderr": done.stderr + listing.stderr}
    for folder in (tmp_path, work):
        texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(texts) > 20
    assert any(name.endswith(".wandb") for name in texts)
    leaks = {
        name: text[max(text.find(b"planted") - 80, 0) :][:200]
        for name, text in texts.items()
        if re.search(rb"planted-?[a-f]{8}", text)
    }
    assert not leaks, "\n".join(leaks)
