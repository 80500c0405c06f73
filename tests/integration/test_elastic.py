"""A run whose nodes, workers or driver die trains on the same samples, in the same steps, as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HOME = Path(__file__).parents[2]
WORKS = 22


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


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A head without CPUs for workers."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_health_check_failure_threshold", "2")
        if ray.is_initialized():
            ray.shutdown()
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def cluster(head: Any) -> Iterator[Any]:
    """The head; nodes are added and killed by the test, and taken away after it."""
    yield head
    for one in list(head.worker_nodes):
        head.remove_node(one, allow_graceful=False)


def newest(settings: Settings) -> Checkpoint | None:
    from momalisa.training import run as runs

    found = read_all(Store(settings.root), runs.plan(settings).name)
    return found[-1] if found else None


def images_seen(settings: Settings) -> int:
    found = newest(settings)
    return found.images_seen if found else 0


def workers(settings: Settings) -> int:
    """How many trained what the newest checkpoint has last seen."""
    found = newest(settings)
    return int(found.training["workers"][-1][1]) if found else 0


def node(cluster: Any, cpus: int = 1) -> Any:
    return cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20)


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


@contextmanager
def running(listed: list[str], address: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The train job as a program, in a session of its own; with whatever it started it is gone afterwards."""
    process = driver(listed, address, log)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(process: subprocess.Popen[bytes], log: Path, reached: Callable[[], bool]) -> None:
    """Until a checkpoint says so."""
    deadline = time.monotonic() + 600
    while not reached():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"not after 600 s: {log.read_text()[-3000:]}"
        time.sleep(0.1)


@pytest.mark.parametrize(("many", "fewer"), [(2, 1), (4, 3)])
def test_nodes_go_and_come(tiny_base: Path, cluster: Any, tmp_path: Path, many: int, fewer: int) -> None:
    """2 -> 1 -> 2 and 4 -> 3 -> 4 workers, however long each change takes: the run has no end but the one that it is asked
    for. Then the same run undisturbed, in one process, as far."""
    from momalisa.training import run as runs
    from momalisa.training.loop import Events, Interrupted, Trainer

    size = {"workers": many, "min_workers": fewer, "images": 10**6, "learning_rate": 3e-4}
    listed, log = arguments(tiny_base, tmp_path / "changing", **size), tmp_path / "log"
    settings = settings_of(listed)
    nodes = [node(cluster) for _ in range(many)]
    with running(listed, cluster.address, log) as process:
        until(process, log, lambda: workers(settings) == many)
        cluster.remove_node(nodes[-1], allow_graceful=False)
        until(process, log, lambda: workers(settings) == fewer)
        node(cluster)
        until(process, log, lambda: workers(settings) == many)
        process.terminate()
        assert process.wait(timeout=400) == 128 + signal.SIGTERM, log.read_text()[-3000:]
    changing = newest(settings)
    assert changing is not None
    counts = [count for _, count in changing.training["workers"]]
    assert set(counts) == {many, fewer}
    assert counts[0] == counts[-1] == many

    alone = settings_of(arguments(tiny_base, tmp_path / "alone", **size))
    trainer = Trainer(runs.load(alone, runs.plan(alone)), Events(ending=lambda: seen() >= changing.images_seen), 1)

    def seen() -> int:
        return trainer.progress.images_seen

    with pytest.raises(Interrupted, match=f"{changing.images_seen} images seen"):
        trainer.train()
    undisturbed = newest(alone)
    assert undisturbed is not None
    losses = changing.training["losses"]
    assert [images for images, _ in losses] == [images for images, _ in trainer.progress.losses]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in trainer.progress.losses], rel=1e-3)
    start = torch.nn.utils.parameters_to_vector(load_base_unet(settings.diffusion).parameters()).detach()
    ours, theirs = (
        torch.nn.utils.parameters_to_vector(load_unet(Store(place.root), one).parameters()).detach()
        for place, one in ((settings, changing), (alone, undisturbed))
    )
    assert float((ours - theirs).norm() / (theirs - start).norm()) < 0.02


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
    from momalisa.training import run as runs

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
    ends = [read_all(Store(one.root), runs.plan(one).name)[-1] for one in (settings, undisturbed)]
    assert [end.images_seen for end in ends] == [2400, 2400]
    assert ends[0].state == ends[1].state  # sha256 of weights, EMA, optimizer moments and losses
    assert ends[0].files == ends[1].files
