"""How the processes of a group compute and exchange: precision, wrapping, gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from momalisa.config import Train

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, where it is wanted, operations give the same bits each time or raise RuntimeError. To be entered before CUDA's
    first product, when cuBLAS reads its workspace (https://docs.pytorch.org/docs/stable/notes/randomness.html)."""
    if not wanted:
        yield
        return
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.pop(CUBLAS, None)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, os.environ[CUBLAS] = False, ":4096:8"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark
        del os.environ[CUBLAS]
        os.environ |= {CUBLAS: workspace} if workspace is not None else {}


def accelerator(settings: Train, workers: int) -> Accelerator:
    """Accelerate for this process. Raises RuntimeError unless it sees every worker of the group.

    In fp32 convolutions on a GPU compute in fp32 too: PyTorch's default, TF32, keeps 10 bits of 23, and by each worker's share
    of the batch cuDNN chooses how it sums.
    """
    cpu = not torch.cuda.is_available()
    if cpu and settings.precision == "fp16":
        raise ValueError("train.precision='fp16' needs a GPU; try bf16 or fp32")
    torch.backends.cudnn.allow_tf32 = settings.precision != "fp32"
    exchange = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    precision = "no" if settings.precision == "fp32" else settings.precision
    found = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[exchange])
    if found.num_processes != workers:
        raise RuntimeError(f"accelerate sees {found.num_processes} processes, the group has {workers}: they would train apart")
    return found


def compress(model: Any) -> None:
    """Let a DDP model exchange its gradients in bfloat16. (A lambda, because DDP refuses the hook's own name without NCCL,
    though Gloo adds bfloat16 too.)"""
    model.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
