"""Beside a GPU weights lie in channels_last: what follows them has their strides, in a fresh run and in a resumed one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from momalisa import checkpoint as checkpoints
from momalisa.storage import Store
from momalisa.training import loop
from momalisa.training.loop import Events, Trainer
from momalisa.training.processes import determinism
from momalisa.training.state import Host, Progress
from tests.training.test_options import run_of

OPTIMIZERS = ["adamw", "adamw8bit"]


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.memory_format:
    """A CPU's, and a GPU's on the CPU."""
    monkeypatch.setattr(loop, "layout", lambda device: request.param)
    return request.param


def followers(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(what, parameter, moment or average) of a trainer's."""
    for name, parameter in trainer.trained.items():
        for key, value in trainer._bare_optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                yield f"{key} of {name}", parameter, value
        for average in (trainer.ema, *trainer.powers.values()):
            yield f"average of {name}", parameter, average.shadow[name]


def resumed(base: Path, place: Path, **options: Any) -> tuple[Trainer, Progress]:
    """Train 24 images, and again from the checkpoint after 16: what is written at the end is the same, bit by bit."""
    if options["optimizer"] == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    whole = run_of(base, place / "a", images=24, power_ema=True, **options)
    fresh = Trainer(whole, Events())
    progress = fresh.train()
    shutil.copytree(place / "a" / "checkpoints", place / "b" / "checkpoints")
    shutil.rmtree(place / "b" / "checkpoints" / "o" / "000000024")
    again = replace(whole, store=Store(str(place / "b")))
    trainer = Trainer(again, Events())
    assert trainer.progress.images_seen == 16
    for one in (fresh, trainer):
        strides = [(what, tuple(parameter.stride()), tuple(value.stride())) for what, parameter, value in followers(one)]
        assert len(strides) == 5 * len(one.trained)
        assert [found for found in strides if found[1] != found[2]] == []
    assert trainer.train() == progress
    ends = [checkpoints.read_all(run.store, "o")[-1] for run in (whole, again)]
    assert ends[0].state == ends[1].state
    return trainer, progress


def transposed(trainer: Trainer) -> bool:
    """Whether convolutions' weights lie in channels_last."""
    weight: torch.Tensor = trainer.bare.unet.conv_in.weight
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_adam_resumes_bit_by_bit(tiny_base: Path, tmp_path: Path, layout: torch.memory_format) -> None:
    trainer, _ = resumed(tiny_base, tmp_path, optimizer="adamw")
    assert transposed(trainer) == (layout is torch.channels_last)


@pytest.mark.usefixtures("layout")
def test_eight_bit_adam_learns_and_resumes_bit_by_bit(tiny_base: Path, tmp_path: Path) -> None:
    """bitsandbytes walks through moments as they lie in memory, and makes weights contiguous after it has begun them."""
    trainer, progress = resumed(tiny_base, tmp_path, optimizer="adamw8bit")
    assert not transposed(trainer)
    plain = Trainer(run_of(tiny_base, tmp_path / "c", images=24), Events()).train()
    assert [loss for _, loss in progress.losses] == pytest.approx([loss for _, loss in plain.losses], rel=0.1)
    assert progress.losses != plain.losses


def test_a_moment_is_copied_and_its_memory_used_again() -> None:
    live = {"w": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last), "n": torch.tensor(3)}
    host, before = Host(), {name: value.clone() for name, value in live.items()}
    host.reserve(live)
    first = host.copy(live)
    live["w"].add_(1)
    assert all(torch.equal(first[name], value) and first[name].is_contiguous() for name, value in before.items())
    second = host.copy(live)
    assert torch.equal(second["w"], live["w"])
    assert [value.data_ptr() for value in first.values()] == [value.data_ptr() for value in second.values()]
    assert live["w"].data_ptr() != second["w"].data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gpu_resumes_bit_by_bit(tiny_base: Path, tmp_path: Path, optimizer: str) -> None:
    with determinism(True):
        trainer, _ = resumed(tiny_base, tmp_path, optimizer=optimizer)
    assert trainer.device.type == "cuda"
    assert transposed(trainer) == (optimizer == "adamw")
    assert all(value.is_pinned() for value in trainer.snapshot().state.values() if value.dim())


@pytest.mark.gpu
def test_a_step_waits_for_no_number(tiny_base: Path, tmp_path: Path) -> None:
    trainer = Trainer(run_of(tiny_base, tmp_path, images=32, precision="bf16", power_ema=True), Events())
    for _ in range(2):  # what is made once may wait
        trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.batches.close()
