"""BLIP's vision tower (ViT; Dosovitskiy et al. 2021) over the weights of a loaded model, with fused attention.

Pictures arrive as uint8 and are normalised here, on the model's device: a quarter of the bytes of float pixels travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from momalisa.captioner.attention import attend

CHUNK = 8  # pictures that pass through together on a CPU: as fast as more, in less memory


class VisionTower:
    """`BlipVisionModel` as a function. It keeps the model's own parameters, in their type and place."""

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        self.blocks = [Block(layer) for layer in model.encoder.layers]
        embeddings = model.embeddings
        self.patch = embeddings.patch_embedding
        self.first, self.places = embeddings.class_embedding, embeddings.position_embedding  # [1, 1, D], [1, N, D]
        self.norm = model.post_layernorm
        self.device, self.dtype = self.patch.weight.device, self.patch.weight.dtype
        self.mean, self.std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (mean, std))

    @property
    def tokens(self) -> int:
        """N: one of the whole picture, and one to a patch."""
        return int(self.places.shape[1])

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels [B, S, S, 3] uint8, on any device -> states [B, N, D] in the model's type and place."""
        if self.device.type == "cpu":
            return torch.cat([self.states(part) for part in pixels.split(CHUNK)])
        return self.states(pixels.to(self.device, non_blocking=True))

    def states(self, pixels: Tensor) -> Tensor:
        patches = self.patch(self.normalised(pixels)).flatten(2).transpose(1, 2)  # [B, N - 1, D]
        x = torch.cat([self.first.expand(len(pixels), -1, -1), patches], dim=1) + self.places
        for block in self.blocks:
            x = block(x)
        states: Tensor = self.norm(x)
        return states

    def normalised(self, pixels: Tensor) -> Tensor:
        """[B, S, S, 3] uint8 -> [B, 3, S, S] in the model's type: (pixels / 255 - mean) / std."""
        scaled = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return scaled.sub_(self.mean).div_(self.std).to(self.dtype)


class Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads = int(attention.num_heads)
        self.qkv, self.out = attention.qkv, attention.projection
        self.grow, self.activation, self.shrink = mlp.fc1, mlp.activation_fn, mlp.fc2
        self.norms = layer.layer_norm1, layer.layer_norm2

    def __call__(self, x: Tensor) -> Tensor:  # [B, N, D]
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, D / H]
        attended = attend(query, key, value)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        fed: Tensor = self.shrink(self.activation(self.grow(self.norms[1](x))))
        return x + fed
