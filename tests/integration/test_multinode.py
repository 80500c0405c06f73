"""Machines of their own on this machine: training over their network is training on one, and every way to lose one is survived.

The settings that decide how long a recovery takes are cluster.yaml's own. Each fault prints how long it took until a new
checkpoint was written, and how many optimizer steps were taken twice.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy import kuberay
from momalisa.checkpoint import Checkpoint, read_all, read_best
from momalisa.config import Settings, from_file
from momalisa.dataset import Dataset
from momalisa.miniature import wing
from momalisa.storage import Store
from tests.deploy.namespaces import BIN, HOME, Machine, Machines, missing
from tests.integration import test_elastic, test_kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500), pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

TOKEN = "planted-token-of-the-test-1357924680"
IMAGES, BATCH, EVERY = 2560, 16, 320
SIZE = {
    "train.images": IMAGES, "train.batch": BATCH, "train.cell": 4, "train.workers": 2, "train.precision": "fp32",
    "train.learning_rate": 1e-3, "train.checkpoint_every_images": EVERY, "train.evaluate_every_steps": 100000,
    "train.evaluation_prompts": "[]", "train.max_failures": 5, "wandb.mode": "disabled",
}  # fmt: skip


def pre_stop() -> list[str]:
    """What Kubernetes runs in a GPU worker before its SIGTERM: it returns when the notice is over."""
    group = kuberay.gpu_workers(from_file(str(HOME / "configs" / "sd14.yaml")).cluster)
    (container,) = group["template"]["spec"]["containers"]
    return list(container["lifecycle"]["preStop"]["exec"]["command"])


class Site:
    """A head without CPUs, and three hosts of one CPU each: two workers, and one to spare."""

    def __init__(self, machines: Machines) -> None:
        self.machines, self.hosts, self._booted = machines, list[Machine](), 0

    def open(self) -> None:
        """Bring up what is lacking: everything, or a new host that joins for each one that was lost."""
        if not self.machines.machines:
            self.head = self.boot("head")
            self.ray(self.head, "--head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1")
        for name in set(self.machines.machines) - {host.name for host in [self.head, *self.hosts]}:
            self.machines.kill(name)
        new = [self.boot("host") for _ in range(3 - len(self.hosts))]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda host: self.ray(host, f"--address={self.head.address}:6379 --num-cpus=1"), new))
        self.hosts += new

    def close(self) -> None:
        """No process of it is left."""
        for name in list(self.machines.machines):
            self.machines.kill(name)
        self.hosts = []

    def boot(self, kind: str) -> Machine:
        self._booted += 1
        name = f"{kind}{self._booted}"
        self.machines.start(name, {"RUNPOD_POD_ID": name})
        return self.machines.machines[name]

    def ray(self, host: Machine, arguments: str) -> None:
        start = f"ray start {arguments} --node-ip-address=$NODE_IP --object-store-memory=100000000 --disable-usage-stats"
        host.run(f". deploy/node.sh; {start}")

    def strike(self, fault: str, address: str) -> None:
        """Take a host away: at once, by its cable, or with a notice."""
        (host,) = (host for host in self.hosts if host.address == address)
        self.hosts.remove(host)
        if fault == "SIGKILL":
            self.machines.kill(host.name)
        elif fault == "partition":
            self.machines.cut(host.name)
        else:
            host.run(shlex.join(pre_stop()))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    environment = from_file(str(HOME / "configs" / "sd14.yaml")).cluster.environment
    machines = Machines(tmp_path_factory.mktemp("machines"), image={**environment, "RAY_AUTH_TOKEN": TOKEN})
    with machines.up():
        yield Site(machines)


class Job:
    """The train job on the site's head, and what it says."""

    def __init__(self, site: Site, base: Path, folder: Path) -> None:
        self.site, self.options, self.log = site, options(base, folder / "out"), folder / "log"
        self.settings = published(self.options)
        self.start()

    def start(self) -> None:
        """The same command each time."""
        command = self.site.head.inside(
            str(BIN / "python"), "-m", "ray_jobs.train", "--config", "configs/demo.yaml", *self.options
        )
        environment = {**self.site.head.env, "RAY_ADDRESS": "auto"}
        with open(self.log, "ab") as file:
            self.process = subprocess.Popen(command, cwd=HOME, env=environment, stdout=file, stderr=file)

    def until(self, what: Callable[[], object], limit_s: float = 150) -> None:
        deadline = time.monotonic() + limit_s
        while not what():
            assert self.process.poll() is None, self.log.read_text()[-6000:]
            assert time.monotonic() < deadline, self.log.read_text()[-6000:]
            time.sleep(0.05)

    def seen(self) -> int:
        """The images of the newest whole checkpoint."""
        found = Path(self.settings.root).glob("checkpoints/*/*/manifest.json")
        return max((int(path.parent.name) for path in found), default=0)

    def placed(self) -> list[str]:
        return placed(self.log.read_text())

    def resumed(self) -> list[tuple[int, int]]:
        """Each time that training went on: from how many images, and how many of those seen after them it trained again."""
        found = re.findall(r"train: going on from (\d+) images(?:; (\d+) that)?", self.log.read_text())
        return [(int(images), int(again or 0)) for images, again in found]


def placed(log: str) -> list[str]:
    """The addresses of the latest workers, in the order of their ranks."""
    found = re.findall(r"\(ip=([\d.]+), pid=\d+\) world_rank=(\d+)", log)
    return [address for address, _ in sorted(found[-2:], key=lambda pair: int(pair[1]))]


def options(base: Path, root: Path) -> list[str]:
    return [f"--{key}={value}" for key, value in {**SIZE, "root": root, "diffusion.model": base}.items()]


def published(overrides: list[str]) -> Settings:
    made = from_file(str(HOME / "configs" / "demo.yaml"), overrides)
    test_elastic.publish(made)
    return made


def last(settings: Settings) -> Checkpoint:
    (run,) = (Path(settings.root) / "checkpoints").iterdir()
    return read_all(Store(settings.root), run.name)[-1]


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The end of the same run by two processes on one machine, left alone."""
    folder = tmp_path_factory.mktemp("alone")
    overrides = options(tiny_base, folder / "out")
    settings = published(overrides)
    command = [str(BIN / "python"), "-m", "ray_jobs.train", "--config", "configs/demo.yaml", *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_worker_niceness": "0"}
    done = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return last(settings)


@pytest.fixture
def job(site: Site, tiny_base: Path, tmp_path: Path) -> Iterator[Job]:
    site.open()
    made = Job(site, tiny_base, tmp_path)
    yield made
    if made.process.poll() is None:
        site.close()
        made.process.wait()


def check(job: Job, alone: Checkpoint) -> None:
    """The job ends as the run that was left alone did, having gone on once."""
    assert job.process.wait(timeout=200) == 0, job.log.read_text()[-6000:]
    end = last(job.settings)
    assert (end.images_seen, len(job.resumed())) == (IMAGES, 1)
    assert end.training["losses"] == alone.training["losses"]
    assert (end.files, end.state) == (alone.files, alone.state)  # sha256 of weights, EMA and optimizer


@pytest.mark.parametrize(("fault", "rank", "most"), [("SIGKILL", 0, EVERY), ("partition", 1, EVERY), ("notice", 0, 0)])
def test_a_machine_is_lost_and_the_result_is_the_same(
    site: Site, job: Job, alone: Checkpoint, fault: str, rank: int, most: int
) -> None:
    """`most`: how many images may be trained again. The first rank's machine is the one that writes checkpoints."""
    job.until(lambda: job.seen() >= 2 * EVERY)
    began = time.monotonic()
    job.until(lambda: job.seen() >= 3 * EVERY)
    time.sleep(0.7 * (time.monotonic() - began))  # between two checkpoints, and between two log lines
    assert len(set(job.placed())) == 2, "one worker on each of two hosts that are not the head"
    began = time.monotonic()
    site.strike(fault, job.placed()[rank])
    struck_s = time.monotonic() - began
    job.until(job.resumed)
    loaded_s = time.monotonic() - began
    ((images, again),) = job.resumed()
    job.until(lambda: job.seen() > images)
    figures = {"stepping_again_s": time.monotonic() - began, "until_struck_s": struck_s, "until_loaded_s": loaded_s}
    print(
        json.dumps({"fault": fault, "optimizer_steps_lost": again / BATCH} | {name: round(s, 1) for name, s in figures.items()})
    )
    assert set(job.placed()) == {host.address for host in site.hosts}
    assert again <= most
    check(job, alone)


def test_the_head_is_lost_and_the_same_command_goes_on(site: Site, job: Job, alone: Checkpoint) -> None:
    job.until(lambda: job.seen() >= 2 * EVERY)
    site.close()
    job.process.wait()
    kept = job.seen()
    site.open()
    began = time.monotonic()
    job.start()
    job.until(job.resumed)
    assert job.resumed() == [(kept, 0)]  # nobody is left who knew of more
    job.until(lambda: job.seen() > kept)
    print(json.dumps({"fault": "head", "stepping_again_s": round(time.monotonic() - began, 1)}))
    check(job, alone)


def test_the_whole_pipeline_on_hosts_beside_the_head_is_the_pipeline_on_one_machine(site: Site, tmp_path: Path) -> None:
    """From pictures in a folder to a promoted checkpoint: the same versions, and bit by bit the same weights."""
    site.open()
    works = tmp_path / "works"
    works.mkdir()
    for exhibit in wing.exhibits()[:16]:
        wing.hung(exhibit.scene, exhibit.seed).save(works / f"{exhibit.record['ObjectID']}.png")
    source = ["--collect.source.kind=folder", f"--collect.source.location={works}"]
    ends = []
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_worker_niceness": "0"}
    for name, environment in {"hosts": {**site.head.env, "RAY_ADDRESS": "auto"}, "alone": here}.items():
        command = [str(BIN / "python"), "-m", "ray_jobs.pipeline", "--config", "configs/demo.yaml", f"--root={tmp_path / name}"]
        command += [*source, *test_kill.SMALL, "--train.workers=2"]
        command = site.head.inside(*command) if name == "hosts" else command
        done = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-6000:]
        (run,) = (tmp_path / name / "checkpoints").iterdir()
        end = read_all(Store(str(tmp_path / name)), run.name)[-1]
        assert read_best(Store(str(tmp_path / name))).run == run.name
        ends.append((Dataset(f"{tmp_path / name}/dataset").latest().sha256, end.files, end.state, end.training["losses"]))
        if name == "hosts":
            on = set(placed(said))
            assert len(on) == 2
            assert on <= {host.address for host in site.hosts}
    assert ends[0] == ends[1]
