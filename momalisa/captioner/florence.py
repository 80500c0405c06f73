"""Florence-2 (Xiao et al. 2023): pictures -> detailed captions, through transformers' own implementation.

The prompt is the same for every picture, so its tokens are made once; greedy, like the short captions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from momalisa.config import Caption
from momalisa.pretrained import pretrained
from momalisa.square import Square


class Florence:
    """A detailed captioner with its processor."""

    def __init__(self, model: Any, processor: Any, settings: Caption) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor, self.max_new_tokens = processor, settings.long_max_new_tokens
        self.square = square_of(processor.image_processor)
        size = self.square.size_px
        blank = Image.fromarray(np.zeros((size, size, 3), dtype=np.uint8))
        prompt = processor(text=[settings.long_prompt], images=[blank], return_tensors="pt")
        self.input_ids: Tensor = prompt.input_ids.to(model.device)  # [1, image tokens + prompt]
        self.mean, self.std = (
            torch.tensor(values, device=model.device).view(1, 3, 1, 1)
            for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
        )

    @classmethod
    def load(cls, settings: Caption, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Florence:
        """Raises ValueError where the model cannot be loaded."""
        from transformers import Florence2ForConditionalGeneration

        if settings.long_model is None:
            raise ValueError("caption.long_model is not set; try florence-community/Florence-2-base")
        model = pretrained(Florence2ForConditionalGeneration, settings.long_model, revision=settings.long_revision, dtype=dtype)
        return cls(model.to(device), load_processor(settings), settings)

    @torch.no_grad()
    def generate(self, pixels: Tensor) -> list[str]:
        """Squares [B, S, S, 3] uint8 -> a text each; empty where the model said nothing."""
        ids = self.model.generate(
            input_ids=self.input_ids.expand(len(pixels), -1),
            attention_mask=torch.ones_like(self.input_ids).expand(len(pixels), -1),
            pixel_values=self.normalised(pixels),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        texts = self.processor.batch_decode(ids.cpu(), skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def normalised(self, pixels: Tensor) -> Tensor:
        """[B, S, S, 3] uint8 -> [B, 3, S, S] in the model's type and place."""
        scaled = pixels.to(self.model.device).permute(0, 3, 1, 2).float() / 255
        return ((scaled - self.mean) / self.std).to(self.model.dtype)


def load_processor(settings: Caption) -> Any:
    """The picture processor and the tokenizer alone. Raises ValueError where they cannot be loaded."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, Florence2Processor

    model, options = str(settings.long_model), {"revision": settings.long_revision}
    return Florence2Processor(pretrained(CLIPImageProcessorPil, model, **options), pretrained(AutoTokenizer, model, **options))


def square_of(image_processor: Any) -> Square:
    """The square that a picture processor of transformers makes. Raises ValueError where it makes none."""
    size, crop = image_processor.size, getattr(image_processor, "do_center_crop", False)
    height, width = (size.get(side) if isinstance(size, dict) else getattr(size, side, None) for side in ("height", "width"))
    if crop or not height or height != width:
        raise ValueError(f"{type(image_processor).__name__} with size={size}, do_center_crop={crop} makes no plain squares")
    return Square(int(height), int(image_processor.resample))
