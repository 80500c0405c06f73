"""BLIP: pictures -> captions (Li et al. 2022).

Unconditional, greedy captions: the decoder starts from `[DEC]` alone. One start token for every picture means no
padding, so a caption does not depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from momalisa.captioner.decoder import Decoder
from momalisa.captioner.florence import square_of
from momalisa.captioner.vision import VisionTower
from momalisa.config import Caption, Diffusion, Settings
from momalisa.pretrained import pretrained
from momalisa.weights import identity, locate, short_id

PREPROCESSING = 3  # raise it when a picture's square, its normalisation or the form of a text changes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Captioner:
    """A captioning model with its picture processor and tokenizer."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, settings: Caption) -> None:
        """`model`: a `BlipForConditionalGeneration`, whose weights stay where they are. Raises ValueError where
        `max_new_tokens` does not fit it."""
        model.eval().requires_grad_(False)
        self.tokenizer, self.prefix, self.batch = tokenizer, settings.prefix, settings.batch
        self.square = square_of(processor)
        self.vision = VisionTower(model.vision_model, processor.image_mean, processor.image_std)
        self.decoder = Decoder(model.text_decoder, self.vision.tokens, settings.max_new_tokens, settings.batch)

    @classmethod
    def load(cls, settings: Caption, device: torch.device | str = "cpu") -> Captioner:
        """Raises ValueError where the model cannot be loaded."""
        from transformers import BlipForConditionalGeneration

        options = {"revision": settings.revision, "dtype": DTYPES[settings.precision]}
        model = pretrained(BlipForConditionalGeneration, settings.model, **options)
        return cls(model.to(device), *load_processors(settings), settings)

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """Squares [B, S, S, 3] uint8 -> token ids [B, max_new_tokens] int64 on the CPU."""
        return torch.cat([self.decoder(self.vision(part)) for part in pixels.split(self.batch)])

    def generate(self, pixels: Tensor) -> list[str]:
        """Squares [B, S, S, 3] uint8 -> a caption each, with the prefix; an empty text where the model said nothing."""
        texts = self.tokenizer.batch_decode(self.tokens(pixels), skip_special_tokens=True)
        return [self.prefix + words if (words := " ".join(text.split())) else "" for text in texts]

    def caption(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Pictures -> captions; an empty text where the model said nothing."""
        if not pictures:
            return []
        return self.generate(torch.from_numpy(np.stack([self.square(picture) for picture in pictures])))


def load_processors(settings: Caption) -> tuple[Any, Any]:
    """The picture processor and the tokenizer alone: quick to load. Raises ValueError where they cannot be."""
    from transformers import BertTokenizer, BlipImageProcessorPil

    options = {"revision": settings.revision}
    return pretrained(BlipImageProcessorPil, settings.model, **options), pretrained(BertTokenizer, settings.model, **options)


def captioner_id(settings: Settings) -> str:
    """Twelve hexadecimal digits: whatever shapes a captions table. Raises ValueError for a path that is not there."""
    chosen = settings.caption
    short = identity(chosen.model, chosen.revision), chosen.prefix, chosen.max_new_tokens, chosen.precision
    long: tuple[object, ...] = ()
    if chosen.long_model is not None:
        long = identity(chosen.long_model, chosen.long_revision), chosen.long_prompt, chosen.long_max_new_tokens
    return short_id("captioner", PREPROCESSING, short, long, _tokenizer_identity(settings.diffusion))


def _tokenizer_identity(diffusion: Diffusion) -> str:
    """What counts the tokens of fused texts."""
    where = Path(locate(diffusion.model))
    return identity(str(where / "tokenizer")) if where.is_dir() else identity(diffusion.model, diffusion.revision)
