"""Groups of processes train as one: the same samples in the same steps, the same losses, and bit by bit after a resume."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from momalisa import checkpoint as checkpoints
from momalisa.config import Diffusion, Train
from momalisa.storage import Store
from momalisa.training.cache import LatentCache
from momalisa.training.loop import Events, Run, Trainer

TRAIN = Train(
    images=48,
    batch=8,
    workers=1,
    precision="fp32",
    learning_rate=3e-3,
    warmup_images=16,
    schedule="cosine",
    ema_decay=0.8,
    checkpoint_every_images=24,
    evaluate_every_steps=10_000,
)
WORKS = 11
ADAPTERS = {"lora_rank": 2, "lora_text_encoder": True, "prior_weight": 1.0}

# Imports what training needs, once; then each line of its input names a group, whose processes are forked.
STARTER = """
import json, os, pickle, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import accelerate, diffusers.models.unets.unet_2d_condition, peft, transformers.models.clip.modeling_clip
from momalisa.storage import Store
from momalisa.training import loop
from momalisa.training.loop import Events, Interrupted, Trainer
from momalisa.training.writer import Writer

def asked(rank, scratch):  # the second process is asked to end; a checkpoint takes a second to be written
    write = Writer._write
    Writer._write = lambda *arguments: time.sleep(1) or write(*arguments)
    return Events(ending=lambda: rank == 1)

def behind(rank, scratch):  # the second process does not see the newest checkpoint yet, and is late; downloads are noted
    read_all, download, shared = loop.checkpoints.read_all, Store.download, loop.node.shared
    def noted(store, folder, *arguments):
        with open(scratch / "downloads", "a") as file:
            file.write(folder + "\\n")
        return download(store, folder, *arguments)
    Store.download = noted
    if rank:
        loop.checkpoints.read_all = lambda *arguments: read_all(*arguments)[:-1]
        loop.node.shared = lambda *arguments: time.sleep(1) or shared(*arguments)
    return Events()

def elsewhere(rank, scratch):  # the second process has another disk
    if rank:
        Store._full = lambda store, path: store.root + "/elsewhere/" + path
        loop.node.folder = lambda chosen: scratch / "elsewhere"
    return Events()

def work(scratch, workers, rank, port, part):
    os.environ |= {"WORLD_SIZE": str(workers), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    run = pickle.loads((scratch / "run.pickle").read_bytes())
    trainer = Trainer(run, globals()[part](rank, scratch) if part else Events(), workers=workers)
    at, seen = trainer.batches.at, {}
    def noted(images_seen):
        parts = at(images_seen)
        seen[images_seen] = [work for part in parts if part.weights.sum() > 0 for work in part.ids]
        return parts
    trainer.batches.at = noted
    try:
        progress = trainer.train()
    except Interrupted as interrupted:
        there = [saved.images_seen for saved in loop.checkpoints.read_all(run.store, run.name)]
        told = [str(interrupted), there]
    else:
        told = [progress.losses, sorted(seen.items())]
    (scratch / f"{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
    os._exit(0)  # before the trainer goes: the last owner of the group waits for a thread that waits for Python's lock

def forked(*arguments):
    process = os.fork()
    if process:
        return process
    try:
        work(*arguments)
    except BaseException as error:
        (arguments[0] / f"{arguments[2]}.error").write_text(str(error))
        sys.excepthook(*sys.exc_info())
    os._exit(1)

for line in sys.stdin:
    scratch, workers, port, part = json.loads(line)
    processes = [forked(Path(scratch), workers, rank, port, part) for rank in range(workers)]
    print(json.dumps([os.waitpid(process, 0)[1] for process in processes]), flush=True)
"""
Losses = list[list[float]]


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> Run:
    """Eleven works of two shapes: epochs end inside batches, and inside cells."""
    source = torch.Generator().manual_seed(5)
    mean, log_variance = torch.randn((WORKS, 4, 4, 8), generator=source), torch.full((WORKS, 4, 4, 8), -4.0)
    moments = list(torch.cat([mean, log_variance], dim=1).half())
    moments = [row if number % 3 else row[:, :, :4].clone() for number, row in enumerate(moments)]
    token_ids = torch.randint(0, 600, (WORKS, 77), generator=source)
    names = [f"work-{i}" for i in range(WORKS)]
    cache = LatentCache(names, names, moments, token_ids, mirrored=[row + 1 for row in moments])
    return Run("tiny-0", TRAIN, Diffusion(model=str(tiny_base)), cache, Store(str(tmp_path / "store")))


def changed(run: Run, **settings: Any) -> Run:
    return replace(run, train=Train(**{**run.train.model_dump(), **settings}))


class Groups:
    """Groups of processes, one after another, each process forked from one that has imported torch and the rest."""

    def __init__(self) -> None:
        self.starter = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, run: Run, workers: int, scratch: Path, part: str = "") -> tuple[Losses, dict[int, list[str]]]:
        """Train a run with so many processes: its losses, and which works stood in each step."""
        assert self.ends(run, workers, scratch, part) == [0] * workers
        told = [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(workers)]
        assert all(losses == told[0][0] for losses, _ in told)  # reduced over the group
        works: dict[int, list[str]] = {}
        for _, seen in told:
            for images_seen, ids in seen:
                works.setdefault(images_seen, []).extend(ids)
        return told[0][0], works

    def ends(self, run: Run, workers: int, scratch: Path, part: str) -> list[int]:
        """How each process ended. `part`: which of the starter's functions each begins with, to play it."""
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "run.pickle").write_bytes(pickle.dumps(changed(run, workers=workers)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        assert self.starter.stdin is not None
        assert self.starter.stdout is not None
        print(json.dumps([str(scratch), workers, port, part]), file=self.starter.stdin, flush=True)
        found: list[int] = json.loads(self.starter.stdout.readline())
        return found

    def close(self) -> None:
        """Ends the starter, and what it started if a test was given up."""
        os.killpg(self.starter.pid, signal.SIGKILL)
        self.starter.communicate()


@pytest.fixture(scope="module")
def group() -> Iterator[Groups]:
    made = Groups()
    yield made
    made.close()


def weights_of(run: Run) -> torch.Tensor:
    last = checkpoints.read_all(run.store, run.name)[-1]
    return torch.nn.utils.parameters_to_vector(checkpoints.load_unet(run.store, last).parameters()).detach()


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options", [{}, {"micro_batch": 1, "flip": True}, {"lora_rank": 2, "lora_text_encoder": True, "prior_weight": 1.0}], ids=str
)
def test_many_workers_train_as_one(run: Run, group: Groups, tmp_path: Path, workers: int, options: dict[str, Any]) -> None:
    """Three workers share four cells: one of them has two."""
    run = changed(run, **options)
    alone = Trainer(run, Events()).train()
    together = replace(run, store=Store(str(tmp_path / "together")))
    losses, _ = group(together, workers, tmp_path / "group")
    assert [images for images, _ in losses] == [images for images, _ in alone.losses]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in alone.losses], rel=1e-5)
    start = torch.nn.utils.parameters_to_vector(checkpoints.load_base_unet(run.diffusion).parameters()).detach()
    ours, theirs = weights_of(run), weights_of(together)
    assert float((ours - theirs).norm() / (ours - start).norm()) < 1e-3


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_group_goes_on_from_a_checkpoint_bit_by_bit(run: Run, group: Groups, tmp_path: Path, workers: int) -> None:
    """DDP lays its buckets out anew after a process's first exchange; at four workers the order of sums shows."""
    places = [tmp_path / "whole", tmp_path / "resumed"]
    whole, resumed = (replace(run, store=Store(str(place))) for place in places)
    first, _ = group(whole, workers, tmp_path / "first")
    shutil.copytree(places[0] / "checkpoints", places[1] / "checkpoints")
    shutil.rmtree(places[1] / "checkpoints" / run.name / "000000048")
    assert [one.images_seen for one in checkpoints.read_all(resumed.store, run.name)] == [24]
    assert group(resumed, workers, tmp_path / "second")[0] == first
    ends = [checkpoints.read_all(part.store, run.name)[-1] for part in (whole, resumed)]
    assert ends[0].images_seen == ends[1].images_seen == 48
    assert ends[0].state == ends[1].state  # sha256 of weights, EMA, optimizer and losses
    assert ends[0].files == ends[1].files


def test_all_go_on_from_the_checkpoint_that_the_first_has_chosen(run: Run, group: Groups, tmp_path: Path) -> None:
    """One sees the newest later than the others, as over a network; one does not reach the store at all. Those of a node have one
    download, however late one of them is."""
    run = changed(run, cache_dir=str(tmp_path / "cache"))
    whole, _ = group(run, 2, tmp_path / "whole")
    for part in ("behind", "elsewhere"):
        place = tmp_path / part
        shutil.copytree(run.store.root, place)
        shutil.rmtree(place / "checkpoints" / run.name / "000000048")
        again = replace(run, store=Store(str(place)))
        if part == "behind":
            losses, works = group(again, 2, tmp_path / f"{part}-group", part)
            assert (losses, min(works)) == (whole, 24)
            assert (tmp_path / f"{part}-group" / "downloads").read_text() == f"checkpoints/{run.name}/000000024/state\n"
            assert sorted(path.name for path in (tmp_path / "cache" / "states").iterdir()) == ["entering", "lock"]
        else:
            assert 0 not in group.ends(again, 2, tmp_path / f"{part}-group", part)
            said = (tmp_path / f"{part}-group" / "1.error").read_text()
            assert said.startswith("worker 1 cannot read the checkpoint from which worker 0 goes on (")


def test_nobody_leaves_before_the_checkpoint_is_written(run: Run, group: Groups, tmp_path: Path) -> None:
    long = changed(run, images=400, checkpoint_every_images=400)
    assert group.ends(long, 2, tmp_path / "group", "asked") == [0, 0]
    told = [json.loads((tmp_path / "group" / f"{rank}.json").read_text()) for rank in range(2)]
    assert told == [["80 images seen; the same command goes on from there", [80]]] * 2


def test_gradients_in_sixteen_bits_train_nearly_the_same(run: Run, group: Groups, tmp_path: Path) -> None:
    runs = [replace(run, store=Store(str(tmp_path / kind))) for kind in ("none", "bf16")]
    runs[1] = changed(runs[1], gradient_compression="bf16")
    (full, _), (half, _) = (group(one, 2, tmp_path / f"group-{number}") for number, one in enumerate(runs))
    assert full != half
    assert [loss for _, loss in half] == pytest.approx([loss for _, loss in full], rel=2e-2)
