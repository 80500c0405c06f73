"""Attention, by the kernel that is fastest for its shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 128  # queries: a CPU does so few faster in two plain products than in the fused kernel, and any number in half precision


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value.

    Query [B, H, M, d], key and value [B, H, N, d], seen [N] bool: which keys count, the same for all rows -> [B, H, M, d].
    """
    if query.device.type != "cpu" or (query.dtype == torch.float32 and query.shape[2] > FEW):
        mask = None if seen is None else seen.expand(len(query), 1, query.shape[2], -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = torch.matmul(query, key.transpose(-1, -2)).mul_(query.shape[-1] ** -0.5)
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), value)
