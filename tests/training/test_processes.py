"""What a process computes on, and in which precision, whatever the machine has beside."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType

from momalisa.training.loop import Events, Trainer
from tests.training.test_options import run_of


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that this process sees; whoever touches it fails, for there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one, as Ray makes it for workers that ask for no GPU."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    meeting = f"file://{tmp_path / 'group'}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo", "visible")
def test_workers_without_a_gpu_leave_those_alone_that_they_see(tiny_base: Path, tmp_path: Path) -> None:
    trainer = Trainer(run_of(tiny_base, tmp_path, images=16), Events())
    assert trainer.device.type == "cpu"
    assert trainer.accelerator.distributed_type is DistributedType.MULTI_CPU  # else DDP is told of GPUs, and refuses
    assert trainer.train().images_seen == 16


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allowed everywhere."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", True)])
def test_fp32_is_fp32(tiny_base: Path, tmp_path: Path, precision: str, allowed: bool) -> None:
    Trainer(run_of(tiny_base, tmp_path, precision=precision), Events())
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
