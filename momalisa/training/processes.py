"""How the processes of a group compute and exchange: precision, wrapping, gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from momalisa.config import Train
from momalisa.precision import full_precision

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

    A group that exchanges over Gloo computes on CPUs: Ray leaves a machine's GPUs visible to workers that asked for none.
    """
    cpu = not torch.cuda.is_available() or (dist.is_initialized() and dist.get_backend() == "gloo")
    if cpu and settings.precision == "fp16":
        raise ValueError("train.precision='fp16' needs a GPU; try bf16 or fp32")
    exchange = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    precision = "no" if settings.precision == "fp32" else settings.precision
    if precision == "no":
        full_precision()
    found = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[exchange])
    if found.num_processes != workers:
        raise RuntimeError(f"accelerate sees {found.num_processes} processes, the group has {workers}: they would train apart")
    return found


def layout(device: torch.device) -> torch.memory_format:
    """How pictures lie in memory there: channels_last on GPUs; contiguous on a CPU, where GroupNorm's backward pass is slow in
    channels_last."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def compress(model: Any) -> None:
    """Let a DDP model exchange its gradients in bfloat16. (A lambda, because DDP refuses the hook's own name without NCCL,
    though Gloo adds bfloat16 too.)"""
    model.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
