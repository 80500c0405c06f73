"""What a process computes with where fp32 is asked for."""

from __future__ import annotations

import torch


def full_precision() -> None:
    """From here on fp32 is fp32 in this process: on a GPU cuDNN's convolutions, unless told otherwise, have TF32's 10 bits of
    mantissa (https://docs.pytorch.org/docs/stable/notes/cuda.html)."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
