"""The VAE and the text encoder of a Stable Diffusion pipeline: pictures <-> latents, texts -> embeddings.

Moments, not samples, are cached: `sample` draws a fresh latent at each use and scales it, once, by the VAE's own
factor. That factor is used nowhere else but here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from momalisa.buckets import Bucketed
from momalisa.config import Diffusion, Encode, Settings
from momalisa.pretrained import pretrained
from momalisa.square import Square
from momalisa.weights import identity, locate, short_id

PREPROCESSING = 1  # raise it when `to_pixels` or the stored form of moments changes
LOG_VARIANCE = (-30.0, 20.0)  # the limits diffusers puts on it


class Autoencoder:
    """A KL autoencoder (Kingma & Welling 2013; Rombach et al. 2022) and its scaling factor."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels to one latent place
        self.channels = int(vae.config.latent_channels)
        self.scaling_factor = float(vae.config.scaling_factor)

    @classmethod
    def load(cls, diffusion: Diffusion, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Raises ValueError where the model cannot be loaded."""
        from diffusers import AutoencoderKL

        options = {"revision": diffusion.revision, "variant": diffusion.variant, "dtype": dtype}
        return cls(pretrained(AutoencoderKL, diffusion.model, subfolder="vae", **options).to(device))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in -1..1 -> moments [B, 2C, H/8, W/8] float16 on the CPU: mean, then log-variance, unscaled.

        Raises ValueError where H or W is not a multiple of `factor`.
        """
        height, width = pixels.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"a picture of {width}x{height} pixels cannot be encoded: both must be multiples of {self.factor}")
        return self.moments(pixels).to("cpu", torch.float16)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """What `encode` stores, before it is rounded: [B, 2C, H/8, W/8] in the model's type and place."""
        moments: Tensor = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.parameters
        return moments

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pixels [B, 3, 8h, 8w] float32 in 0..1, on the model's device."""
        unscaled = latents.to(self.vae.device, torch.float32) / self.scaling_factor
        pixels: Tensor = self.vae.decode(unscaled.to(self.vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def sample(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """(mean + exp(log-variance / 2) * noise) * scaling_factor.

    Moments [B, 2C, h, w] of any float type and noise [B, C, h, w] -> scaled latents [B, C, h, w] float32.
    """
    mean, log_variance = moments.float().chunk(2, dim=-3)
    return (mean + torch.exp(log_variance.clamp(*LOG_VARIANCE) / 2) * noise.float()) * scaling_factor


class TextEncoder:
    """The CLIP tokenizer and text encoder of a pipeline, as Stable Diffusion 1.x conditions on them."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def load(cls, diffusion: Diffusion, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Raises ValueError where the model cannot be loaded."""
        from transformers import CLIPTextModel

        options = {"revision": diffusion.revision, "variant": diffusion.variant, "dtype": dtype}
        model = pretrained(CLIPTextModel, diffusion.model, subfolder="text_encoder", **options)
        return cls(load_tokenizer(diffusion), model.to(device))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> token ids [B, L] int64, padded and cut to the model's length (77 for Stable Diffusion 1.x)."""
        return tokenize(self.tokenizer, texts)

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [B, L] -> last hidden states [B, L, D] after the final layer norm, in the model's type and place."""
        states: Tensor = self.model(input_ids=token_ids.to(self.model.device)).last_hidden_state
        return states


def load_tokenizer(diffusion: Diffusion) -> Any:
    """The pipeline's tokenizer alone. Raises ValueError where it cannot be loaded."""
    from transformers import CLIPTokenizer

    return pretrained(CLIPTokenizer, diffusion.model, subfolder="tokenizer", revision=diffusion.revision)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Texts -> token ids [B, L] int64, padded and cut to `tokenizer.model_max_length`."""
    if not texts:
        return torch.empty((0, tokenizer.model_max_length), dtype=torch.int64)
    ids: Tensor = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def to_pixels(picture: Image.Image, size_px: int) -> Tensor:
    """A picture -> [3, size, size] float32 in -1..1: the short side scaled (Lanczos, antialiased), the centre kept."""
    return from_bytes(torch.from_numpy(square(size_px)(picture).copy())[None])[0]


def square(size_px: int) -> Square:
    """The part of a picture that is encoded without buckets."""
    return Square(size_px, Image.Resampling.LANCZOS, keep="centre")


def frame(encode: Encode) -> Square | Bucketed:
    """How pictures are cut and scaled to be encoded."""
    return Bucketed(encode.resolution_px, encode.step_px) if encode.buckets else square(encode.resolution_px)


def from_bytes(pixels: Tensor) -> Tensor:
    """Pixels [B, H, W, 3] uint8 -> [B, 3, H, W] float32 in -1..1, in the same place."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in 0..1 -> RGB pictures."""
    array = pixels.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(item) for item in array]


def encoder_id(settings: Settings, captioner_id: str) -> str:
    """Twelve hexadecimal digits: the encoders' weights, the tokenizer, resolution, preprocessing, the captions' id and kind, and
    whether there are mirror images."""
    diffusion = settings.diffusion
    where = Path(locate(diffusion.model))
    if where.is_dir():
        weights = tuple(identity(str(where / part)) for part in ("vae", "text_encoder", "tokenizer"))
    else:
        weights = (identity(diffusion.model, diffusion.revision),)
    chosen = settings.encode
    kind: tuple[object, ...] = () if chosen.caption == "short" else (chosen.caption,)
    if chosen.buckets:
        kind += ("buckets", chosen.step_px)
    if chosen.mirrored:
        kind += ("mirrored",)
    return short_id("encoder", PREPROCESSING, weights, diffusion.variant, chosen.resolution_px, captioner_id, *kind)
