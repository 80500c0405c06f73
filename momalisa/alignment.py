"""How well pictures show what was asked for, by a judge that is not the model's own text encoder.

Two kinds of judges: a CLIP or SigLIP, whose score is the cosine of picture and text (CLIPScore, Hessel et al. 2021, without
its factor), and a BLIP, whose score is the mean log-likelihood of the text's tokens given the picture (VisualGPTScore, Lin et
al. 2024). A model that was trained under the very text encoder that judges it is judged by its teacher: that is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from momalisa.config import Diffusion
from momalisa.pretrained import pretrained

BATCH = 32
MAX_TOKENS = 64  # of a text that BLIP judges
Scorer = Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]  # pictures and their texts -> [N] float64


def load(model: str, revision: str | None, diffusion: Diffusion, device: torch.device | str = "cpu") -> Scorer:
    """The judge that a model's kind calls for.

    Raises ValueError for another kind of model, and for a CLIP whose text half is the diffusion model's own.
    """
    from transformers import AutoConfig

    kind = pretrained(AutoConfig, model, revision=revision).model_type
    if kind == "blip":
        return Likelihood(model, revision, device)
    if kind not in ("clip", "siglip", "siglip2"):
        raise ValueError(f"promote.alignment_model={model} is a {kind!r}; a CLIP, SigLIP or BLIP can judge")
    found = Cosine(model, revision, device)
    if found.teaches(diffusion):
        raise ValueError(
            f"promote.alignment_model={model} is the text encoder that {diffusion.model} was trained under, and would judge "
            "itself; try laion/CLIP-ViT-H-14-laion2B-s32B-b79K or google/siglip-so400m-patch14-384 (miniature://blip for the "
            "miniature)"
        )
    return found


class Cosine:
    """CLIP or SigLIP."""

    def __init__(self, model: str, revision: str | None, device: torch.device | str) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = pretrained(AutoModel, model, revision=revision, dtype=torch.float32).to(device).eval()
        self.processor = pretrained(AutoImageProcessor, model, revision=revision, backend="pil")
        self.tokenizer = pretrained(AutoTokenizer, model, revision=revision)

    def teaches(self, diffusion: Diffusion) -> bool:
        """Whether the diffusion model's text encoder has this model's table of words."""
        from transformers import CLIPTextModel

        options = {"revision": diffusion.revision, "variant": diffusion.variant}
        theirs = _words(pretrained(CLIPTextModel, diffusion.model, subfolder="text_encoder", **options))
        ours = _words(self.model.text_model)
        return ours.shape == theirs.shape and torch.equal(ours.cpu().half(), theirs.half())

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        parts = []
        length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(pictures), BATCH):
            pixels = self.processor(images=list(pictures[start : start + BATCH]), return_tensors="pt")
            words = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding="max_length",  # as SigLIP was trained
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            found = self.model(**pixels.to(self.model.device), **words.to(self.model.device))
            seen, said = (torch.nn.functional.normalize(value, dim=-1) for value in (found.image_embeds, found.text_embeds))
            parts.append((seen * said).sum(-1).cpu().double())
        return torch.cat(parts).numpy()


def _words(text_model: Any) -> torch.Tensor:
    table: torch.Tensor = text_model.get_input_embeddings().weight.detach()
    return table


class Likelihood:
    """BLIP: how likely it is to say just this of a picture, in nats a token."""

    def __init__(self, model: str, revision: str | None, device: torch.device | str) -> None:
        from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

        self.model = pretrained(BlipForConditionalGeneration, model, revision=revision, dtype=torch.float32).to(device).eval()
        self.processor = pretrained(BlipImageProcessorPil, model, revision=revision)
        self.tokenizer = pretrained(BertTokenizer, model, revision=revision)
        self.tokenizer.padding_side = "right"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        parts, device = [], self.model.device
        for start in range(0, len(pictures), BATCH):
            pixels = self.processor(images=list(pictures[start : start + BATCH]), return_tensors="pt")["pixel_values"]
            words = self.tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            ids, mask = words["input_ids"].to(device), words["attention_mask"].to(device)
            ids[:, 0] = self.model.config.text_config.bos_token_id  # [DEC] begins a caption
            seen = self.model.vision_model(pixel_values=pixels.to(device)).last_hidden_state
            logits = self.model.text_decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).logits
            likely = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]  # [B, L-1]
            parts.append(((likely * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).cpu().double())
        return torch.cat(parts).numpy()
