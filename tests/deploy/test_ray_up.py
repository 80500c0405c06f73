"""`ray up`, demand, a job, idle nodes going, faults, `ray down`: a fake RunPod whose pods are namespaces with real raylets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.fake_runpod import KEY, FakeRunpod, Fault
from tests.deploy.namespaces import BIN, HOME, Machines, missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

TOKEN = "planted-token-of-the-test-0123456789"
JOB = """
import ray
ray.init(log_to_driver=False)
@ray.remote(num_gpus=1)
class Worker:
    def where(self):
        return ray.util.get_node_ip_address()
both = [Worker.remote(), Worker.remote()]
print("ran on", len(set(ray.get([worker.where.remote() for worker in both]))), "nodes")
"""


KILL_AUTOSCALER = """
pid=$(pgrep -of '[m]onitor[.]py')
cp /proc/$pid/cmdline ~/autoscaler.cmdline
cp /proc/$pid/environ ~/autoscaler.environ
kill -KILL $pid
"""
START_AUTOSCALER = """
mapfile -td '' line < ~/autoscaler.cmdline
mapfile -td '' variables < ~/autoscaler.environ
setsid env -i "${variables[@]}" "${line[@]}" > ~/autoscaler.log 2>&1 < /dev/null &
"""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeRunpod]:
    folder = tmp_path_factory.mktemp("cloud")
    machines = Machines(folder)
    with machines.up(), FakeRunpod(host=machines).serving(machines.gateway) as fake:
        fake.secrets = {"RUNPOD_API_KEY": KEY, "RAY_AUTH_TOKEN": TOKEN}
        machines.image = {"MOMALISA_RUNPOD_URL": fake.url, "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        yield fake
        assert not fake.violations


@pytest.fixture(scope="module")
def laptop(cloud: FakeRunpod, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ray COMMAND cluster.yaml ARGUMENTS` with the repository's own file, made small."""
    folder = tmp_path_factory.mktemp("laptop")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    config = yaml.safe_load((HOME / "cluster.yaml").read_text())
    config |= {"cluster_name": "test", "max_workers": 2, "idle_timeout_minutes": 0.15}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    config["provider"]["usd_per_hour_max"] = 3 * 0.69 + 0.1  # a head and two workers, and not one more
    config["available_node_types"]["gpu"]["node_config"]["gpus"] = ["NVIDIA GeForce RTX 4090"]
    config["available_node_types"]["head"]["resources"] = {"CPU": 1, "GPU": 0}
    config["available_node_types"]["gpu"] |= {"max_workers": 2, "resources": {"CPU": 1, "GPU": 1}}
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[commands] = [
            f"{line} --object-store-memory=100000000" if "ray start" in line else line for line in config[commands]
        ]
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    environment = {**os.environ, "RUNPOD_API_KEY": KEY, "MOMALISA_RUNPOD_URL": cloud.url, "MOMALISA_STATE": str(folder),
                   "TMPDIR": str(folder),  # Ray keeps what it knows of a cluster there
                   "PYTHONPATH": str(HOME), "RAY_USAGE_STATS_ENABLED": "0", "RAY_UP_enable_autoscaler_v2": "1"}  # fmt: skip

    def ray(command: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        line = [str(BIN / "ray"), command, str(folder / "cluster.yaml"), *arguments]
        return subprocess.run(
            line, capture_output=True, text=True, check=False, timeout=200, env={**environment, **changes}, cwd=folder
        )

    ray.folder, ray.environment = folder, environment  # type: ignore[attr-defined]
    return ray


def through_the_tunnel(folder: Path, environment: dict[str, str]) -> tuple[int, int]:
    """What the head's dashboard answers through `ray dashboard`, without and with the token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(BIN / "ray"), "dashboard", str(folder / "cluster.yaml"), "--port", str(port)]
    with open(folder / "tunnel.log", "wb") as log:
        tunnel = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}/api/jobs/"

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listening, 90, "the tunnel")
        keys: list[dict[str, str]] = [{}, {"Authorization": f"Bearer {TOKEN}"}]
        without, with_it = (httpx.get(address, headers=headers, timeout=30).status_code for headers in keys)
        return without, with_it
    finally:
        os.killpg(tunnel.pid, signal.SIGTERM)
        tunnel.wait()


def workers(cloud: FakeRunpod) -> list[str]:
    return [pod_id for pod_id, pod in list(cloud.pods.items()) if "-worker-" in pod["body"]["name"]]


def wait_for(what: Callable[[], Any], limit_s: float, said: str) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, f"{said}: not within {limit_s:.0f} s"
        time.sleep(0.5)


def test_a_cluster_comes_works_survives_faults_and_goes(cloud: FakeRunpod, laptop: Any) -> None:
    refused = laptop("up", "-y", "--no-config-cache", RUNPOD_API_KEY="rpa_wrong")
    assert refused.returncode == 1
    assert "does not know this RUNPOD_API_KEY" in refused.stderr + refused.stdout
    assert "Traceback" not in refused.stderr
    assert cloud.made == []

    cloud.maps_after_s = 1.0
    cloud.faults = [Fault("POST", "/v2/pods", 500, after=True), Fault("GET", "/v2/pods", 429, retry_after=1)]
    up = laptop("up", "-y", "--no-config-cache")
    assert up.returncode == 0, up.stdout[-3000:] + up.stderr[-3000:]
    assert cloud.made == ["test-head"]
    assert KEY not in up.stdout + up.stderr
    assert TOKEN not in up.stdout + up.stderr

    assert through_the_tunnel(laptop.folder, laptop.environment) == (401, 200)

    cloud.dying = 1  # the first worker dies while starting
    cloud.faults = [Fault("POST", "/v2/pods", 500, after=True), Fault("POST", "/v2/pods", 400, detail="no instances available")]
    job = laptop("exec", f"ray job submit --address http://127.0.0.1:8265 -- python -c '{JOB}'")
    assert "ran on 2 nodes" in job.stdout, job.stdout[-3000:] + job.stderr[-3000:]
    assert len(workers(cloud)) == 2
    rented = len(cloud.made)

    (head,) = set(cloud.pods) - set(workers(cloud))
    assert "2 gpu" in cloud.host.machines[head].run("ray status").stdout
    cloud.down = True  # and the autoscaler is killed meanwhile
    time.sleep(3)
    cloud.host.machines[head].run(KILL_AUTOSCALER)
    cloud.down = False
    cloud.host.machines[head].run(START_AUTOSCALER)
    wait_for(lambda: not workers(cloud), 120, "idle workers are given back")
    assert len(cloud.made) == rented

    down = laptop("down", "-y")
    assert down.returncode == 0, down.stdout[-3000:] + down.stderr[-3000:]
    assert cloud.pods == {}
    assert cloud.host.machines == {}
