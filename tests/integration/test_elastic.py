"""A run whose nodes, workers or driver die trains on the same samples, in the same steps, as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from momalisa.checkpoint import load_base_unet, load_unet, read_all
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


def images_seen(settings: Settings) -> int:
    from momalisa.training import run as runs

    found = read_all(Store(settings.root), runs.plan(settings).name)
    return found[-1].images_seen if found else 0


def wait_until(settings: Settings, images: int, work: threading.Thread, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while images_seen(settings) < images:
        assert work.is_alive(), "training ended early"
        assert time.monotonic() < deadline, f"only {images_seen(settings)} images after {limit_s:g} s"
        time.sleep(0.2)


def node(cluster: Any, cpus: int = 1) -> Any:
    return cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20)


@pytest.mark.parametrize(("workers", "fewer", "images"), [(2, 1, 4800), (4, 3, 3200)])
def test_nodes_go_and_come(tiny_base: Path, cluster: Any, tmp_path: Path, workers: int, fewer: int, images: int) -> None:
    """2 -> 1 -> 2 and 4 -> 3 -> 4 workers, then the same run undisturbed with one process."""
    from momalisa.training import run as runs
    from momalisa.training.loop import Events, Trainer
    from ray_jobs import train

    size = {"workers": workers, "min_workers": fewer, "images": images}
    settings = settings_of(arguments(tiny_base, tmp_path / "changing", **size))
    nodes = [node(cluster) for _ in range(workers)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            train.run(settings)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(settings, 320, thread)
    cluster.remove_node(nodes[-1], allow_graceful=False)
    wait_until(settings, images_seen(settings) + 480, thread)
    node(cluster)
    thread.join(timeout=500)
    assert not thread.is_alive()
    assert not failures, failures
    planned = runs.plan(settings)
    changing = read_all(Store(settings.root), planned.name)[-1]
    sizes = {tuple(entry) for entry in changing.training["workers"]}
    assert {count for _, count in sizes} == {fewer, workers}, sizes

    os.environ.pop("RANK", None)
    alone = settings_of(arguments(tiny_base, tmp_path / "alone", **size))
    progress = Trainer(runs.load(alone, planned), Events(), 1).train()
    losses = changing.training["losses"]
    assert [images for images, _ in losses] == [images for images, _ in progress.losses]
    # the same sums in another order: 1e-7 at first, which hundreds of steps at a high learning rate let grow
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in progress.losses], rel=1e-3)
    undisturbed = read_all(Store(alone.root), planned.name)[-1]
    start = torch.nn.utils.parameters_to_vector(load_base_unet(settings.diffusion).parameters()).detach()
    ours, theirs = (
        torch.nn.utils.parameters_to_vector(load_unet(Store(place.root), one).parameters()).detach()
        for place, one in ((settings, changing), (alone, undisturbed))
    )
    assert float((ours - theirs).norm() / (theirs - start).norm()) < 0.02


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
