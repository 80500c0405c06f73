"""`ray up`, demand, a job, idle nodes going, faults, `ray down`: a fake RunPod whose pods are namespaces with real raylets."""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.fake_runpod import KEY, FakeRunpod, Fault
from tests.deploy.namespaces import BIN, HOME, Machine, Machines, missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

TOKEN = "planted-token-of-the-test-0123456789"
RTX_USD = 0.69
CAP_USD = 3 * RTX_USD + 0.1  # a head and two workers, and not one more
JOB = """
import ray
ray.init(log_to_driver=False)
@ray.remote(num_gpus=1)
class Worker:
    def where(self):
        return ray.util.get_node_ip_address()
crew = [Worker.remote() for _ in range(WANTED)]
there, _ = ray.wait([worker.where.remote() for worker in crew], num_returns=ENOUGH)
print("ran on", len(set(ray.get(there))), "nodes")
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
        fake.secrets = {"RUNPOD_ACCOUNT_KEY": KEY, "RAY_AUTH_TOKEN": TOKEN}
        machines.image = {"MOMALISA_RUNPOD_URL": fake.url, "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        yield fake
        assert not fake.violations


@pytest.fixture(scope="module")
def laptop(cloud: FakeRunpod, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ray COMMAND cluster.yaml ARGUMENTS` with the repository's own file, made small."""
    folder = tmp_path_factory.mktemp("laptop")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    config = yaml.safe_load((HOME / "cluster.yaml").read_text())
    config |= {"cluster_name": "test", "max_workers": 4, "idle_timeout_minutes": 0.25}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    config["provider"]["usd_per_hour_max"] = CAP_USD
    config["available_node_types"]["head"]["resources"] = {"CPU": 1, "GPU": 0}
    config["available_node_types"]["gpu"] |= {"max_workers": 4, "resources": {"CPU": 1, "GPU": 1}}
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[commands] = [
            f"{line} --object-store-memory=100000000" if "ray start" in line else line for line in config[commands]
        ]
    environment = {**os.environ, "RUNPOD_API_KEY": KEY, "MOMALISA_RUNPOD_URL": cloud.url, "MOMALISA_STATE": str(folder),
                   "TMPDIR": str(folder),  # Ray keeps what it knows of a cluster there
                   "PYTHONPATH": str(HOME), "RAY_USAGE_STATS_ENABLED": "0", "RAY_UP_enable_autoscaler_v2": "1"}  # fmt: skip

    def ray(command: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        line = [str(BIN / "ray"), command, str(folder / "cluster.yaml"), *arguments]
        return subprocess.run(
            line, capture_output=True, text=True, check=False, timeout=300, env={**environment, **changes}, cwd=folder
        )

    def write(image: str = "image:1", **provider: Any) -> None:
        """With changes to the provider's part, `environment` added to what is there."""
        changed = copy.deepcopy(config)
        provider["environment"] = changed["provider"]["environment"] | provider.get("environment", {})
        changed["provider"] |= provider
        for node_type in changed["available_node_types"].values():
            node_type["node_config"] |= {"gpus": ["NVIDIA GeForce RTX 4090"], "image": image}
        (folder / "cluster.yaml").write_text(yaml.safe_dump(changed))

    ray.folder, ray.environment, ray.write = folder, environment, write  # type: ignore[attr-defined]
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


def submitted(laptop: Any, wanted: int, enough: int) -> subprocess.CompletedProcess[str]:
    """A job that asks for so many GPUs, and ends once it has got enough of them."""
    job = JOB.replace("WANTED", str(wanted)).replace("ENOUGH", str(enough))
    done: subprocess.CompletedProcess[str] = laptop(
        "exec", f"ray job submit --address http://127.0.0.1:8265 -- python -c '{job}'"
    )
    return done


def the_head(cloud: FakeRunpod) -> tuple[str, Machine]:
    (pod_id,) = set(cloud.pods) - set(workers(cloud))
    return pod_id, cloud.host.machines[pod_id]


def test_an_image_that_cannot_be_pulled_is_given_up_with_its_log(cloud: FakeRunpod, laptop: Any) -> None:
    laptop.write(image="absent:1", start_timeout_s=4)
    cloud.unpullable = {"absent:1"}
    up = laptop("up", "-y", "--no-config-cache")
    assert up.returncode == 1
    assert "is still PROVISIONING after 4 s; its log ends: error pulling image absent:1" in up.stderr + up.stdout
    assert cloud.made.pop() == "test-head"
    assert cloud.pods == {}


def test_a_cluster_comes_works_survives_faults_and_goes(cloud: FakeRunpod, laptop: Any) -> None:
    laptop.write()
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
    _, head = the_head(cloud)

    assert through_the_tunnel(laptop.folder, laptop.environment) == (401, 200)
    wait_for(lambda: "1 head" in head.run("ray status").stdout, 60, "the autoscaler runs")

    # The autoscaler is killed while a launch is in flight: the next one takes it over, and rents no second pod.
    cloud.starts_after_s = 8.0
    cloud.faults = [Fault("POST", "/v2/pods", 500, after=True), Fault("POST", "/v2/pods", 400, detail="no instances available")]
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(submitted, laptop, 1, 1)
        wait_for(lambda: set(workers(cloud)) & set(cloud.host.machines), 90, "a worker is rented")
        (worker,) = workers(cloud)
        assert cloud.status(worker) == "PROVISIONING"
        assert "RUNPOD_ACCOUNT_KEY" not in cloud.host.machines[worker].env
        head.run(KILL_AUTOSCALER)
        head.run(START_AUTOSCALER)
        assert "ran on 1 nodes" in job.result().stdout, job.result().stdout[-3000:] + job.result().stderr[-3000:]
    assert len(cloud.made) == 2

    # Three are wanted, the hourly cap allows for two, and the second dies while starting.
    cloud.starts_after_s, cloud.dying = 0.0, 1
    job = submitted(laptop, 3, 2)
    cloud.down = True  # for longer than nodes may be idle: they stay, and go once it is back
    assert "ran on 2 nodes" in job.stdout, job.stdout[-3000:] + job.stderr[-3000:]
    assert cloud.dying == 0
    assert cloud.dearest == pytest.approx(3 * RTX_USD)
    assert "left of provider.usd_per_hour_max" in head.run("cat ~/autoscaler.log /tmp/ray/session_latest/logs/monitor*").stdout
    rented = len(cloud.made)

    time.sleep(60)
    assert len(workers(cloud)) == 2
    cloud.down = False
    wait_for(lambda: not workers(cloud), 120, "idle workers are given back")
    assert len(cloud.made) == rented

    down = laptop("down", "-y")
    assert down.returncode == 0, down.stdout[-3000:] + down.stderr[-3000:]
    assert cloud.pods == {}
    assert cloud.host.machines == {}


def test_workers_without_a_head_give_themselves_back(cloud: FakeRunpod, laptop: Any) -> None:
    laptop.write(environment={"MOMALISA_ORPHAN_S": "6", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"})
    up = laptop("up", "-y", "--no-config-cache")
    assert up.returncode == 0, up.stdout[-3000:] + up.stderr[-3000:]
    job = submitted(laptop, 1, 1)
    assert "ran on 1 nodes" in job.stdout, job.stdout[-3000:] + job.stderr[-3000:]
    cloud.vanish(the_head(cloud)[0])  # SIGKILL of every process
    (worker,) = workers(cloud)
    assert cloud.status(worker) == "RUNNING"
    wait_for(lambda: not cloud.pods, 60, "the worker gives itself back")
    assert f"DELETE /v2/pods/{worker}" in cloud.asked
