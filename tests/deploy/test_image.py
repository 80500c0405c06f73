"""The image: what can be known of it without an engine. Its Dockerfile is linted, and its install steps run from nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.namespaces import BIN, HOME

DOCKERFILE = (HOME / "deploy" / "Dockerfile").read_text()


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run(
        [str(BIN / "hadolint"), str(HOME / "deploy" / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_it_is_not_root_brings_no_weights_and_copies_what_is_there() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["1000"]
    assert "HEALTHCHECK" in DOCKERFILE
    for kind in ("gpu", "cpu"):
        assert (HOME / "deploy" / f"requirements-{kind}.lock").is_file()
    for name in re.findall(r"/opt/momalisa/(deploy/[\w.]+)", DOCKERFILE):
        assert (HOME / name).is_file()
    assert {".git", "out", ".venv"} <= set((HOME / ".dockerignore").read_text().split())


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_the_lock_is_what_the_project_asks_for_and_every_line_has_a_hash(kind: str) -> None:
    text = (HOME / "deploy" / f"requirements-{kind}.lock").read_text()
    entries = re.findall(r"^([A-Za-z0-9_.-]+)==([^ \\]+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[A-Za-z0-9]", text, re.MULTILINE))
    locked = {name.lower().replace("_", "-"): version for name, version, _ in entries}
    wanted = re.findall(
        r'^    "([\w-]+)(?:\[[\w,]+\])?==([\w.]+)",$', (HOME / "pyproject.toml").read_text().split("[project.optional")[0], re.M
    )
    assert len(wanted) > 15
    for name, version in wanted:
        assert locked[name.lower()].split("+")[0] == version
    assert ("nvidia-nccl-cu13" in locked or any(name.startswith("nvidia-") for name in locked)) == (kind == "gpu")


def test_compose_is_on_loopback_and_wants_a_token() -> None:
    services = yaml.safe_load((HOME / "deploy" / "docker-compose.yaml").read_text())["services"]
    for service in services.values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
    assert services["head"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert services["head"]["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
    assert services["page"]["cap_drop"] == ["ALL"]


def test_the_scripts_are_bash() -> None:
    for script in sorted((HOME / "deploy").glob("*.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True)
    unknown = subprocess.run(
        ["bash", str(HOME / "deploy" / "install.sh"), "all", "x", "y"], capture_output=True, text=True, check=False
    )
    assert (unknown.returncode, "not 'all'" in unknown.stderr) == (2, True)


@pytest.mark.image
@pytest.mark.timeout(1800)
def test_its_install_steps_work_in_a_clean_environment(tmp_path: Path) -> None:
    """The CPU lock's steps, word for word, and then what the image must be able to do. Takes minutes and 2 GB for a while."""
    venv, source = tmp_path / "venv", tmp_path / "momalisa"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HOME, capture_output=True, check=True).stdout.decode().split("\0")
    for name in listed:
        if name and not name.startswith(("tests/", "docs/", "bench/")) and (HOME / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / name, source / name)
    environment = {**os.environ, "PYTHON": str(BIN / "python3.11") if (BIN / "python3.11").exists() else "python3.11"}
    environment.pop("PYTHONPATH", None)
    steps = [("libraries", str(source / "deploy" / "requirements-cpu.lock")), ("project", str(source))]
    for what, where in steps:
        done = subprocess.run(
            ["bash", str(source / "deploy" / "install.sh"), what, str(venv), where],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    code = "import torch, deploy.runpod.node_provider, ray_jobs.pipeline, serve.app, momalisa.miniature; print(torch.__version__)"
    ran = subprocess.run(
        [str(venv / "bin" / "python"), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("2.13.0")
    dry = [str(venv / "bin" / "python"), "-m", "ray_jobs.train", "--config", str(source / "configs" / "sd14.yaml"), "--dry-run"]
    assert (
        "stable-diffusion"
        in subprocess.run(dry, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    )
    shutil.rmtree(venv)
