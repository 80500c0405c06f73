"""A run whose nodes die and come back trains on the same samples, in the same steps, as one that was left alone."""

from __future__ import annotations

import os
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


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Latents are published as if the encode job had made them."""
    options = {
        "root": tmp_path / "changing",
        "diffusion.model": tiny_base,
        "train.images": 4800,
        "train.batch": 16,
        "train.cell": 4,
        "train.workers": 2,
        "train.min_workers": 1,
        "train.resize_check_s": 3,
        "train.precision": "fp32",
        "train.learning_rate": 1e-3,
        "train.checkpoint_every_images": 160,
        "train.evaluate_every_steps": 100000,
        "train.max_failures": 5,
        "wandb.mode": "disabled",
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    made = from_file(str(HOME / "configs" / "demo.yaml"), [*arguments, "--train.evaluation_prompts=[]"])
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


def test_nodes_go_and_come(settings: Settings, cluster: Any, tmp_path: Path) -> None:
    """2 -> 1 -> 2 workers, then the same run undisturbed with one process."""
    from momalisa.training import run as runs
    from momalisa.training.loop import Events, Trainer
    from ray_jobs import train

    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            train.run(settings)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(settings, 320, thread)
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_until(settings, images_seen(settings) + 480, thread)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    thread.join(timeout=500)
    assert not thread.is_alive()
    assert not failures, failures
    planned = runs.plan(settings)
    changing = read_all(Store(settings.root), planned.name)[-1]
    sizes = {tuple(entry) for entry in changing.training["workers"]}
    assert {workers for _, workers in sizes} == {1, 2}, sizes

    os.environ.pop("RANK", None)
    alone = settings.model_copy(update={"root": str(tmp_path / "alone")})
    publish(alone)
    progress = Trainer(runs.load(alone, planned), Events(), 1).train()
    losses = changing.training["losses"]
    assert [images for images, _ in losses] == [images for images, _ in progress.losses]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in progress.losses], rel=1e-3)
    undisturbed = read_all(Store(alone.root), planned.name)[-1]
    start = torch.nn.utils.parameters_to_vector(load_base_unet(settings.diffusion).parameters()).detach()
    ours, theirs = (
        torch.nn.utils.parameters_to_vector(load_unet(Store(place.root), one).parameters()).detach()
        for place, one in ((settings, changing), (alone, undisturbed))
    )
    assert float((ours - theirs).norm() / (theirs - start).norm()) < 0.02
