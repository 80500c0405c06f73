"""A laptop and a token-protected cluster: nothing without the token, a stage with one command, and a stop that loses no step."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deploy import submit
from momalisa import cost
from momalisa.checkpoint import read_all
from momalisa.config import Settings, from_file
from momalisa.storage import Store
from tests.deploy.namespaces import BIN, HOME
from tests.integration import test_elastic

TOKEN = "planted-token-of-the-test-9876543210"
LIMIT_BYTES = 100 * 1024 * 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_what_a_job_carries_is_below_rays_limit(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    carried, package = yaml.safe_load((HOME / "runtime_env.yaml").read_text()), tmp_path / "code.zip"
    create_package(str(HOME), package, include_gitignore=True, excludes=carried["excludes"])
    assert package.stat().st_size < 0.9 * LIMIT_BYTES
    names = zipfile.ZipFile(package).namelist()
    assert "momalisa/miniature/weights/blip/model.safetensors" in names
    assert not any(re.search(r"^(tests|out|\.git|\.venv)/", name) for name in names)


def test_no_variable_of_a_job_holds_a_secret() -> None:
    carried = yaml.safe_load((HOME / "runtime_env.yaml").read_text())
    assert not any(re.search("KEY|TOKEN$|SECRET|PASSWORD", name) for name in carried["env_vars"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--config", "configs/demo.yaml", "--train.imagez=3"], "unrecognized arguments: --train.imagez=3"),
        (
            ["train", "--config", "configs/sd14.yaml", "--root=out", "--train.workers=8"],
            "are 8 GPUs, but the cluster has at most 4",
        ),
        (["train", "--config", "configs/sd14.yaml"], "root=gs://YOUR-BUCKET/moma is a placeholder"),
        (
            ["pipeline", "--config", "configs/sd14.yaml", "--root=gs://ours/moma", "--train.workers=4"],
            "full fine-tuning over 4 nodes",
        ),
        (["paint", "--config", "configs/demo.yaml"], "invalid choice: 'paint'"),
    ],
)
def test_a_mistake_is_found_before_anything_is_sent(arguments: list[str], said: str) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "deploy.submit", *arguments], cwd=HOME, capture_output=True, text=True, check=False
    )
    assert (refused.returncode, said in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("stage", "cloud", "force"), [("train", "runpod", True), ("train", "gke", False), ("encode", "runpod", False)]
)
def test_slow_links_are_refused_only_where_they_matter(stage: str, cloud: cost.Cloud, force: bool) -> None:
    submit.check(from_file(str(HOME / "configs" / "sd14.yaml"), ["--root=out", "--train.workers=4"]), stage, cloud, force)


def ray_that_says(folder: Path, status: str) -> list[str]:
    (folder / "ray").write_text(f'#!/bin/sh\n[ "$1" = logs ] || echo "{status}"\n')
    (folder / "ray").chmod(0o755)
    return [str(folder / "ray")]


@pytest.mark.parametrize(
    ("status", "returned", "said"),
    [
        ("Job 'x' succeeded", 0, ""),
        ("Job 'x' failed", 1, "x: Job 'x' failed"),
        ("Job 'x' was stopped", 1, "was stopped"),
        (
            "",
            75,
            "was lost, and the job goes on without it. Open the tunnel again.*ray job logs --address http://here --follow x",
        ),
        ("Status for job 'x': RUNNING", 75, "goes on without it"),
    ],
)
def test_a_tunnel_that_was_lost_is_no_end_of_the_job(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], status: str, returned: int, said: str
) -> None:
    assert submit.follow(ray_that_says(tmp_path, status), "http://here", "x") == returned
    assert re.search(said, capfd.readouterr().err, re.DOTALL)


@pytest.mark.parametrize("said", ["package 6f401a7.zip was refused", "in 14013 ms", "RuntimeError: port 40100"])
def test_only_a_status_speaks_of_a_token(said: str) -> None:
    assert "wants another token" not in submit.explained("http://here", said)
    assert "wants another token" in submit.explained("http://here", f"status 401: {said}")


def test_no_cluster_at_the_address() -> None:
    environment = {**os.environ, "RAY_ADDRESS": f"http://127.0.0.1:{free_port()}"}
    command = [sys.executable, "-m", "deploy.submit", "collect", "--config", "configs/demo.yaml"]
    refused = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "no cluster answers" in refused.stderr
    assert "Traceback" not in refused.stderr


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.dashboard, self.gcs, self.agent, self.client = free_port(), free_port(), free_port(), free_port()
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_worker_niceness": "0",
            "RAY_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        where = [
            "--node-ip-address=127.0.0.1",
            f"--port={self.gcs}",
            f"--dashboard-port={self.dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={self.agent}",
            f"--ray-client-server-port={self.client}",
            "--num-cpus=3",
            "--object-store-memory=100000000",
        ]
        started = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        with open(folder / "ray.log", "wb") as log:
            self.process = subprocess.Popen(
                [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", *where],
                env=started,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def status(self, port: int, path: str, token: str | None = TOKEN, method: str = "GET") -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        data = b"{}" if method != "GET" else None
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return 0

    def run(self, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **changes}
        return subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True, check=False, timeout=500)

    def logs(self, job: str) -> str:
        return self.run(str(BIN / "ray"), "job", "logs", job).stdout

    def until(self, what: Callable[[], Any], limit_s: float, said: str) -> None:
        deadline = time.monotonic() + limit_s
        while not what():
            assert time.monotonic() < deadline, f"{said}: not within {limit_s:.0f} s"
            time.sleep(0.5)

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of its nodes whose command line begins so."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in family if " ".join(one.as_dict(["cmdline"])["cmdline"] or []).startswith(title)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    deadline = time.monotonic() + 60
    while made.status(made.dashboard, "/api/version") != 200 or made.status(made.agent, "/api/local_raylet_healthz") != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    yield made
    os.killpg(made.process.pid, signal.SIGTERM)
    try:
        made.process.wait(timeout=15)
    except subprocess.TimeoutExpired:  # Ray drains for 30 s
        os.killpg(made.process.pid, signal.SIGKILL)
        made.process.wait()


CONTROL = [
    ("GET", "/api/jobs/"),
    ("POST", "/api/jobs/"),
    ("GET", "/api/jobs/x/logs"),
    ("POST", "/api/jobs/x/stop"),
    ("DELETE", "/api/jobs/x"),
    ("GET", "/api/packages/gcs/x.zip"),
    ("PUT", "/api/packages/gcs/x.zip"),
    ("GET", "/api/cluster_status"),
    ("GET", "/nodes?view=summary"),
    ("GET", "/logical/actors"),
    ("GET", "/logical/kill_actor"),
    ("GET", "/api/v0/tasks"),
    ("GET", "/api/v0/logs"),
    ("GET", "/api/serve/applications/"),
    ("PUT", "/api/serve/applications/"),
    ("DELETE", "/api/serve/applications/"),
    ("GET", "/worker/traceback?pid=1"),
    ("GET", "/memory_profile?pid=1"),
    ("GET", "/events"),
]
AGENT = [("POST", "/api/job_agent/jobs/"), ("POST", "/api/job_agent/jobs/x/stop"), ("GET", "/api/job_agent/jobs/x/logs")]


@pytest.mark.slow
def test_every_control_endpoint_wants_the_token(cluster: Cluster) -> None:
    for port, endpoints in ((cluster.dashboard, CONTROL), (cluster.agent, AGENT)):
        for method, path in endpoints:
            assert cluster.status(port, path, None, method) == 401, (method, path)
            assert cluster.status(port, path, "wrong", method) == 403, (method, path)
    assert cluster.status(cluster.dashboard, "/api/jobs/") == 200
    code = f"import ray; ray.init('127.0.0.1:{cluster.gcs}', log_to_driver=False); print(len(ray.nodes()), 'nodes seen')"
    refused = cluster.run(str(BIN / "python"), "-c", code, RAY_AUTH_TOKEN="wrong", RAY_ADDRESS="")
    assert refused.returncode != 0
    assert "nodes seen" not in refused.stdout
    told = cluster.run(sys.executable, "-m", "deploy.submit", "collect", "--config", "configs/demo.yaml", RAY_AUTH_TOKEN="wrong")
    assert "wants another token" in told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("which", ["gcs", "client"])
def test_gcs_and_ray_client_want_the_token_too(cluster: Cluster, which: str) -> None:
    """In gRPC, as `ray.init("host:6379")` and `ray.init("ray://host:10001")` speak it."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc, ray_client_pb2, ray_client_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{getattr(cluster, which)}") as channel:
        if which == "gcs":
            ask, question = (
                gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo,
                gcs_service_pb2.GetAllNodeInfoRequest(),
            )
        else:
            ask, question = ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo, ray_client_pb2.ClusterInfoRequest()

        def answered(**metadata: str) -> grpc.StatusCode:
            try:
                ask(question, metadata=list(metadata.items()), timeout=20, wait_for_ready=True)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        assert answered() == grpc.StatusCode.UNAUTHENTICATED
        assert answered(authorization="Bearer wrong") == grpc.StatusCode.UNAUTHENTICATED
        # Ray Client goes on to look for a session of ours.
        known = {"gcs": grpc.StatusCode.OK, "client": grpc.StatusCode.NOT_FOUND}[which]
        assert answered(authorization=f"Bearer {TOKEN}") == known


def published(base: Path, root: Path) -> tuple[Settings, list[str]]:
    """A run for one worker, and the options that name it."""
    values = {
        "root": root, "diffusion.model": base, "train.images": 3200, "train.batch": 16, "train.cell": 4, "train.workers": 1,
        "train.precision": "fp32", "train.learning_rate": 1e-3, "train.checkpoint_every_images": 320,
        "train.evaluate_every_steps": 100000, "train.evaluation_prompts": "[]", "wandb.mode": "disabled",
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in values.items()]
    made = from_file(str(HOME / "configs" / "demo.yaml"), options)
    test_elastic.publish(made)
    return made, options


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_job_goes_on_from_its_very_step(cluster: Cluster, tiny_base: Path, tmp_path: Path) -> None:
    """Ctrl-C leaves it running, `ray job stop` writes a checkpoint, the same command ends with the weights of one run."""
    from momalisa.training import run as runs
    from momalisa.training.loop import Events, Trainer

    settings, options = published(tiny_base, tmp_path / "stopped")
    command = [sys.executable, "-m", "deploy.submit", "train", "--config", "configs/demo.yaml", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    first = subprocess.Popen(command, cwd=HOME, env=cluster.environment, preexec_fn=listens, **pipes)
    assert first.stdout is not None
    said = ""
    while "train: checkpoint" not in said:
        said += (line := first.stdout.readline())
        assert line, said[-3000:]
    workers = cluster.processes("ray::RayTrainWorker")
    for worker in workers:
        worker.suspend()  # else it might be done before it is asked to stop
    os.killpg(first.pid, signal.SIGINT)
    said += first.communicate(timeout=60)[0]
    (name,) = re.findall(r"(train-[\d-]+) goes on without you", said)
    with ThreadPoolExecutor(1) as thread:
        stopping = thread.submit(cluster.run, str(BIN / "ray"), "job", "stop", name)
        while "asked to stop; writing a checkpoint of this step first" not in (log := cluster.logs(name)):
            assert not stopping.done(), log[-3000:]
        for worker in workers:
            worker.resume()
        assert stopping.result().returncode == 0
    log = cluster.logs(name)
    (seen,) = map(int, re.findall(r"stopped, (\d+) images seen; the same command goes on", log))
    store, planned = Store(settings.root), runs.plan(settings)
    assert 320 <= seen == read_all(store, planned.name)[-1].images_seen < 3200

    again = cluster.run(*command)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-2000:]
    assert f"train: going on from {seen} images\n" in again.stdout
    alone, _ = published(tiny_base, tmp_path / "alone")
    Trainer(runs.load(alone, planned), Events()).train()
    ours, theirs = (read_all(Store(place.root), planned.name)[-1] for place in (settings, alone))
    assert ours.training["losses"] == theirs.training["losses"]
    assert ours.files == theirs.files


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stop_while_workers_wait_for_room_ends_at_once(cluster: Cluster, tiny_base: Path, tmp_path: Path) -> None:
    _, options = published(tiny_base, tmp_path)
    command = [
        sys.executable,
        "-m",
        "deploy.submit",
        "train",
        "--config",
        "configs/demo.yaml",
        *options,
        "--train.cpus_per_worker=9",
    ]
    with subprocess.Popen(command, cwd=HOME, env=cluster.environment, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        (name,) = re.findall(r"submitted (train-[\d-]+)", waiting.stdout.readline())
        cluster.until(lambda: cluster.processes("ray::TrainController"), 240, "the job waits for its workers")
        began = time.monotonic()
        assert cluster.run(str(BIN / "ray"), "job", "stop", name).returncode == 0
        assert time.monotonic() - began < 30  # it would wait for 60
        said = waiting.stdout.read()
    assert "train: stopped, no worker had begun" in said
    assert waiting.returncode == 1
