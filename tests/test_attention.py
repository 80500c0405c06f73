"""Attention written out is torch's own, and is chosen where it pays."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention as Layer
from diffusers.models.attention_processor import AttnProcessor2_0

from momalisa.attention import MOST_KEYS, Attention, choose


def layer() -> Layer:
    torch.manual_seed(0)
    return Layer(query_dim=32, cross_attention_dim=16, heads=4, dim_head=8)


@pytest.mark.parametrize("keys", [77, MOST_KEYS, MOST_KEYS + 1])
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_it_is_the_fused_kernels_attention(keys: int, precision: torch.dtype, tolerance: float) -> None:
    """The values, and the gradients of queries, keys and weights."""
    found = []
    for processor in (AttnProcessor2_0(), Attention()):
        made = layer()
        made.set_processor(processor)
        torch.manual_seed(1)
        queries, others = torch.randn(2, 64, 32, requires_grad=True), torch.randn(2, keys, 16, requires_grad=True)
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            result = made(queries, others)
        result.float().square().mean().backward()
        found.append([result.float(), *(value.grad for value in (queries, others, *made.parameters()))])
    for expected, same in zip(*found, strict=True):
        assert float((same - expected).detach().norm() / expected.detach().norm()) < tolerance


@pytest.mark.parametrize(("keys", "fused"), [(MOST_KEYS, False), (MOST_KEYS + 1, True)])
def test_many_keys_are_left_to_the_fused_kernel(keys: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, called = layer(), []
    made.set_processor(Attention())
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: (called.append(True), kernel(*a, **k))[1]
    )
    made(torch.randn(1, 8, 32), torch.randn(1, keys, 16))
    assert bool(called) is fused


@pytest.mark.parametrize(("precision", "chosen"), [(torch.float32, False), (torch.bfloat16, True)])
def test_it_is_chosen_for_16_bits_on_a_cpu(precision: torch.dtype, chosen: bool) -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    choose(unet, torch.device("cpu"), precision)
    assert all(isinstance(one, Attention) is chosen for one in unet.attn_processors.values())
