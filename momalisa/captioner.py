"""BLIP: pictures -> captions (Li et al. 2022).

Unconditional, greedy captions: the decoder starts from `[DEC]` alone. One start token for every picture means no
padding, so a caption does not depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from momalisa.config import Caption
from momalisa.pretrained import pretrained
from momalisa.weights import identity, short_id

PREPROCESSING = 1  # raise it when `prepare` or the form of the text changes


class Captioner:
    """A captioning model with its picture processor and tokenizer."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, settings: Caption) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor, self.tokenizer = processor, tokenizer
        self.prefix, self.max_new_tokens = settings.prefix, settings.max_new_tokens
        text = model.config.text_config
        if self.max_new_tokens >= text.max_position_embeddings:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} does not fit {settings.model}, which has "
                f"{text.max_position_embeddings} positions; try {text.max_position_embeddings - 1} or less"
            )
        self.start_id, self.dtype = text.bos_token_id, model.dtype

    @classmethod
    def load(cls, settings: Caption, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Captioner:
        """Raises ValueError where the model cannot be loaded."""
        from transformers import BlipForConditionalGeneration

        model = pretrained(BlipForConditionalGeneration, settings.model, revision=settings.revision, dtype=dtype)
        return cls(model.to(device), *load_processors(settings), settings)

    def prepare(self, picture: Image.Image) -> Tensor:
        """A picture -> [3, S, S] float32, as the model was trained: squeezed to a square and normalised."""
        pixels: Tensor = self.processor(images=picture.convert("RGB"), return_tensors="pt").pixel_values
        return pixels[0]

    @torch.no_grad()
    def generate(self, pixels: Tensor) -> list[str]:
        """Prepared pictures [B, 3, S, S] -> a caption each, with the prefix; an empty text where the model said nothing."""
        ids = self.model.generate(
            pixel_values=pixels.to(self.model.device, self.dtype),
            input_ids=self._start(len(pixels)),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        texts = self.tokenizer.batch_decode(ids[:, 1:].cpu(), skip_special_tokens=True)
        return [self.prefix + words if (words := " ".join(text.split())) else "" for text in texts]

    def caption(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Pictures -> captions, in one batch; an empty text where the model said nothing."""
        return self.generate(torch.stack([self.prepare(picture) for picture in pictures])) if pictures else []

    def _start(self, count: int) -> Tensor:
        """[B, 2] int64: the start token, and a last one that `generate` drops before decoding."""
        return torch.full((count, 2), self.start_id, dtype=torch.int64, device=self.model.device)


def load_processors(settings: Caption) -> tuple[Any, Any]:
    """The picture processor and the tokenizer alone: quick to load. Raises ValueError where they cannot be."""
    from transformers import BertTokenizer, BlipImageProcessorPil

    options = {"revision": settings.revision}
    return pretrained(BlipImageProcessorPil, settings.model, **options), pretrained(BertTokenizer, settings.model, **options)


def captioner_id(settings: Caption) -> str:
    """Twelve hexadecimal digits: weights, prefix, length and preprocessing. Raises ValueError for a path that is not there."""
    weights = identity(settings.model, settings.revision)
    return short_id("captioner", PREPROCESSING, weights, settings.prefix, settings.max_new_tokens)
