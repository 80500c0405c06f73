"""Machines of their own on this machine: training over their network is training on one, also where one is lost.

The settings that decide how long a recovery takes are cluster.yaml's own.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from momalisa.checkpoint import read_all
from momalisa.config import Settings, from_file
from momalisa.storage import Store
from tests.deploy.namespaces import BIN, HOME, Machine, Machines, missing
from tests.integration import test_elastic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500), pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

TOKEN = "planted-token-of-the-test-1357924680"
IMAGES, BATCH, EVERY = 6400, 16, 320
SIZE = {
    "train.images": IMAGES, "train.batch": BATCH, "train.cell": 4, "train.workers": 2, "train.precision": "fp32",
    "train.learning_rate": 1e-3, "train.checkpoint_every_images": EVERY, "train.evaluate_every_steps": 100000,
    "train.evaluation_prompts": "[]", "train.max_failures": 5, "wandb.mode": "disabled",
}  # fmt: skip


class Site:
    """A head without CPUs, and hosts of one CPU each: two workers, and one to spare."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        self.machines, self.folder = machines, folder

    def open(self) -> None:
        self.head = self.boot("head")
        self.ray(self.head, "--head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1")
        self.hosts = [self.join(name) for name in ("one", "two", "three")]

    def boot(self, name: str) -> Machine:
        name = f"{name}{len(list(self.folder.glob('*')))}"
        self.machines.start(name, {"RUNPOD_POD_ID": name})
        return self.machines.machines[name]

    def join(self, name: str) -> Machine:
        host = self.boot(name)
        self.ray(host, f"--address={self.head.address}:6379 --num-cpus=1")
        return host

    def ray(self, host: Machine, arguments: str) -> None:
        start = f"ray start {arguments} --node-ip-address=$NODE_IP --object-store-memory=100000000 --disable-usage-stats"
        host.run(f". deploy/node.sh; {start}")

    def train(self, root: Path, base: Path, log: Path) -> subprocess.Popen[bytes]:
        overrides = [f"--{key}={value}" for key, value in {**SIZE, "root": root, "diffusion.model": base}.items()]
        command = self.head.inside(str(BIN / "python"), "-m", "ray_jobs.train", "--config", "configs/demo.yaml", *overrides)
        with open(log, "ab") as file:
            return subprocess.Popen(command, cwd=HOME, env={**self.head.env, "RAY_ADDRESS": "auto"}, stdout=file, stderr=file)

    def workers(self) -> list[Machine]:
        """The hosts that a training process runs on, its first rank's first."""
        found = {}
        for host in self.hosts:
            if host.name not in self.machines.machines:
                continue
            shown = host.run("pgrep -fa '[R]ayTrainWorker' || true").stdout
            if "RayTrainWorker" in shown:
                found[host.name] = host
        return list(found.values())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    environment = from_file(str(HOME / "configs" / "sd14.yaml")).cluster.environment
    machines = Machines(tmp_path / "machines", image={**environment, "RAY_AUTH_TOKEN": TOKEN})
    (tmp_path / "machines").mkdir()
    with machines.up():
        made = Site(machines, tmp_path / "machines")
        made.open()
        yield made


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The same run by one process on one machine."""
    from momalisa.training import run as runs
    from momalisa.training.loop import Events, Trainer

    made = published(tiny_base, tmp_path_factory.mktemp("alone"))
    Trainer(runs.load(made, runs.plan(made)), Events(), 1).train()
    return made


def published(base: Path, root: Path) -> Settings:
    overrides = [f"--{key}={value}" for key, value in {**SIZE, "root": root, "diffusion.model": base}.items()]
    made = from_file(str(HOME / "configs" / "demo.yaml"), overrides)
    test_elastic.publish(made)
    return made


def reaches(settings: Settings, images: int, process: subprocess.Popen[bytes], log: Path, limit_s: float = 150) -> int:
    """Wait for a checkpoint of so many images or more; returns those of the newest."""
    deadline = time.monotonic() + limit_s
    while (newest := test_elastic.images_seen(settings)) < images:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.1)
    return newest


def test_a_machine_is_lost_and_the_result_is_the_same(site: Site, alone: Settings, tiny_base: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    ours = published(tiny_base, tmp_path / "out")
    process = site.train(tmp_path / "out", tiny_base, log)
    reaches(ours, 3 * EVERY, process, log)
    busy = site.workers()
    assert len(busy) == 2, "one worker on each of two hosts that are not the head"
    lost, began = busy[-1], time.monotonic()
    kept = test_elastic.images_seen(ours) + EVERY  # the one that is being written may still come
    site.machines.kill(lost.name)
    reaches(ours, kept + 1, process, log)
    took_s = time.monotonic() - began
    print(json.dumps({"stepping_again_s": round(took_s, 1), "images": kept}))
    assert process.wait(timeout=200) == 0, log.read_text()[-4000:]
    run = next((tmp_path / "out" / "checkpoints").iterdir()).name
    mine, theirs = read_all(Store(ours.root), run)[-1], read_all(Store(alone.root), run)[-1]
    losses, expected = dict(map(tuple, mine.training["losses"])), dict(map(tuple, theirs.training["losses"]))
    assert losses.keys() == expected.keys()
    assert list(losses.values()) == pytest.approx(list(expected.values()), rel=1e-4)
