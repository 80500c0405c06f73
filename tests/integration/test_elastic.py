"""A run whose nodes, workers or driver die trains on the same samples, in the same steps, as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from momalisa.checkpoint import Checkpoint, load_base_unet, load_unet, read_all
from momalisa.config import Settings, from_file
from momalisa.dataset import Dataset
from momalisa.latents import load_tokenizer, tokenize
from momalisa.records import LATENTS, OK
from momalisa.storage import Store
from tests import audit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HOME = Path(__file__).parents[2]
WORKS = 22
TRAINED_ON = 19  # of them, by the hashes of their ids
LENGTH = 3200  # images of an elastic run


def rows(settings: Settings) -> list[dict[str, Any]]:
    """Encoded works in two shapes."""
    random, tokenizer = np.random.default_rng(5), load_tokenizer(settings.diffusion)
    found = []
    for number in range(WORKS):
        height, width = (8, 8) if number % 3 else (8, 16)
        moments = np.concatenate([random.standard_normal((4, height, width)), np.full((4, height, width), -4.0)])
        text = f"A MOMA artwork of: number {number}"
        found.append(
            {
                "id": f"w{number:02d}",
                "moments": moments.astype("<f2").tobytes(),
                "channels": 4,
                "height": height,
                "width": width,
                "caption": text,
                "token_ids": tokenize(tokenizer, [text])[0].tolist(),
                "status": OK,
                "error": "",
            }
        )
    return found


def arguments(base: Path, root: Path, **changes: Any) -> list[str]:
    options = {
        "root": root,
        "diffusion.model": base,
        "encode.buckets": True,
        "train.images": 4800,
        "train.batch": 16,
        "train.cell": 4,
        "train.resize_check_s": 3,
        "train.precision": "fp32",
        "train.learning_rate": 1e-3,
        "train.checkpoint_every_images": 160,
        "train.evaluate_every_steps": 100000,
        "train.max_failures": 5,
        "train.evaluation_prompts": "[]",
        "train.cache_dir": root / "cache",
        "wandb.mode": "disabled",
    }
    options |= {f"train.{key}": value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in options.items()]


def settings_of(listed: list[str]) -> Settings:
    """Latents are published as if the encode job had made them."""
    made = from_file(str(HOME / "configs" / "demo.yaml"), listed)
    publish(made)
    return made


def publish(settings: Settings) -> None:
    from momalisa.captioner import captioner_id
    from momalisa.latents import encoder_id

    dataset, name = Dataset(settings.dataset), encoder_id(settings, captioner_id(settings))
    path = dataset.put_rows(f"latents/{name}", rows(settings), LATENTS)
    dataset.update(lambda latest: latest.with_latents(name, [path]))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs for workers; nodes are added and killed by the tests."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "2")
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def saved(settings: Settings) -> list[Checkpoint]:
    from momalisa.training import run as runs

    return read_all(Store(settings.root), runs.plan(settings).name)


def last(settings: Settings) -> Checkpoint:
    return saved(settings)[-1]


def images_seen(settings: Settings) -> int:
    return max((one.images_seen for one in saved(settings)), default=0)


def wait_until(settings: Settings, reached: Callable[[Checkpoint], bool], work: threading.Thread, limit_s: float = 300) -> None:
    """Until the newest checkpoint says so."""
    deadline = time.monotonic() + limit_s
    while not (found := saved(settings)) or not reached(found[-1]):
        assert work.is_alive(), "training ended early"
        assert time.monotonic() < deadline, f"only {images_seen(settings)} images after {limit_s:g} s"
        time.sleep(0.2)


def node(cluster: Any, cpus: int = 1) -> Any:
    return cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20)


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The run of `LENGTH` images by one process, without Ray."""
    from momalisa.training import run as runs
    from momalisa.training.loop import Events, Trainer

    os.environ.pop("RANK", None)
    settings = settings_of(arguments(tiny_base, tmp_path_factory.mktemp("undisturbed"), images=LENGTH, workers=1))
    with audit.noted(Path(settings.root)):
        Trainer(runs.load(settings, runs.plan(settings)), Events(), 1).train()
    return settings


@pytest.mark.parametrize(("workers", "fewer"), [(2, 1), (4, 3)])
def test_nodes_go_and_come(
    tiny_base: Path,
    undisturbed: Settings,
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    fewer: int,
) -> None:
    """2 -> 1 -> 2 and 4 -> 3 -> 4 workers, in this order; the samples of each step and the losses are those of one process.

    A group trains on while a node goes or comes, but no further than leaves enough of the run for what is to follow.
    """
    from ray_jobs import train

    monkeypatch.setattr(train, "train_worker", audit.train_worker)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")  # as clusters have it
    size = {"workers": workers, "min_workers": fewer, "images": LENGTH, "resize_check_s": 1}
    settings = settings_of(arguments(tiny_base, tmp_path / "changing", **size))
    root = Path(settings.root)
    audit.hold(root, {workers: 960, fewer: 1920})
    nodes = [node(cluster) for _ in range(workers)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            train.run(settings)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(settings, lambda newest: newest.images_seen >= 320, thread)
    cluster.remove_node(nodes[-1], allow_graceful=False)
    wait_until(settings, lambda newest: newest.training["workers"][-1][1] == fewer, thread)
    audit.hold(root, {fewer: 1920})
    node(cluster)
    thread.join(timeout=500)
    assert not thread.is_alive()
    assert not failures, failures
    ours, theirs = last(settings), last(undisturbed)
    segments = ours.training["workers"]
    assert [count for _, count in segments] == [workers, fewer, workers], segments

    batches = audit.steps(root)
    assert list(batches) == list(range(0, LENGTH, 16))
    assert batches == audit.steps(Path(undisturbed.root))
    audit.check_epochs(batches, TRAINED_ON)
    losses, expected = (dict(one.training["losses"]) for one in (ours, theirs))
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, rel=1e-6)  # the same sums in another order: 4e-8 after 200 steps
    assert distance(settings, undisturbed) < 1e-4  # 1.4e-6


def distance(ours: Settings, theirs: Settings) -> float:
    """Between the weights that two runs end with, as a share of how far the second has come from the base."""
    start = torch.nn.utils.parameters_to_vector(load_base_unet(theirs.diffusion).parameters()).detach()
    one, other = (
        torch.nn.utils.parameters_to_vector(load_unet(Store(place.root), last(place)).parameters()).detach()
        for place in (ours, theirs)
    )
    return float((one - other).norm() / (other - start).norm())


def driver(listed: list[str], address: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray_jobs.train", "--config", str(HOME / "configs" / "demo.yaml"), *listed]
    environment = {**os.environ, "RAY_ADDRESS": address}
    with open(log, "ab") as file:
        return subprocess.Popen(command, cwd=HOME, env=environment, stdout=file, stderr=file, start_new_session=True)


def wait_for(settings: Settings, images: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while images_seen(settings) < images:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"only {images_seen(settings)} images: {log.read_text()[-3000:]}"
        time.sleep(0.1)
    time.sleep(random.uniform(0, 0.5))  # somewhere between two checkpoints


def training_processes(nodes: list[Any]) -> list[int]:
    """Ray Train's workers on these nodes."""
    raylets = {info.process.pid for one in nodes for info in one.all_processes["raylet"]}
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent in raylets and b"RayTrainWorker" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_kills_leave_no_trace(tiny_base: Path, cluster: Any, tmp_path: Path) -> None:
    """SIGKILL of a worker, of a node and of the driver; the end is bit by bit that of a run that was left alone."""
    size = {"workers": 4, "images": 2400, "resize_check_s": 60}
    listed, log = arguments(tiny_base, tmp_path / "killed", **size), tmp_path / "log"
    settings = settings_of(listed)
    nodes = [node(cluster, cpus=2) for _ in range(2)]
    process = driver(listed, cluster.address, log)
    wait_for(settings, random.randrange(1, 4) * 160, process, log)
    os.kill(random.choice(training_processes(nodes)), signal.SIGKILL)
    wait_for(settings, images_seen(settings) + random.randrange(1, 3) * 160, process, log)
    cluster.remove_node(nodes[1], allow_graceful=False)
    nodes[1] = node(cluster, cpus=2)
    wait_for(settings, images_seen(settings) + random.randrange(1, 3) * 160, process, log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = images_seen(settings)
    assert before < 2400
    assert driver(listed, cluster.address, log).wait(timeout=400) == 0, log.read_text()[-3000:]

    alone = arguments(tiny_base, tmp_path / "alone", **size)
    undisturbed = settings_of(alone)
    assert driver(alone, cluster.address, log).wait(timeout=400) == 0, log.read_text()[-3000:]
    ends = [last(one) for one in (settings, undisturbed)]
    assert [end.images_seen for end in ends] == [2400, 2400]
    assert ends[0].state == ends[1].state  # sha256 of weights, EMA, optimizer moments and losses
    assert ends[0].files == ends[1].files
