"""Attention on a CPU in 16 bits: products and a softmax where there are few keys, torch's fused kernel where there are many.

In training, the fused kernel's backward pass (`_scaled_dot_product_flash_attention_for_cpu_backward`) works in small blocks
that do not reach the processor's 16-bit matrix units. Written out as two batched products, forward and backward together take
a sixth to a third of the time for 64 queries and 77 keys, a third for 256 and 77, half to nine tenths for 256 and 256 (heads
of 40 and 20 channels); with 1,024 keys the kernel is faster, for the scores no longer fit the caches, and in fp32 from 256
on. Without a backward pass, 32 rows of 64 queries take half to two thirds of the time for 64 and 77 keys.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

MOST_KEYS = 256


class Attention:
    """An attention processor of diffusers' that chooses one of its two."""

    def __init__(self) -> None:
        self.written_out, self.fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries [B, L, C] and what keys and values are made of [B, K, D] (None: the queries) -> [B, L, C]."""
        keys = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape[1]
        chosen = self.written_out if keys <= MOST_KEYS else self.fused
        found: torch.Tensor = chosen(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return found


def choose(unet: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Give a UNet that computes in `dtype` on this device the attention that is fastest there."""
    if device.type == "cpu" and dtype is not torch.float32:
        unet.set_attn_processor(Attention())
