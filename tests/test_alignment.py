"""The judge prefers the right caption, and is not the model's own teacher."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from momalisa import alignment
from momalisa.config import Diffusion
from momalisa.miniature import draw, models
from momalisa.weights import locate

MINIATURE = Diffusion(model="miniature://diffusion")


def scenes(count: int) -> list[draw.Scene]:
    rng = random.Random(4)
    return [draw.sample_scene(rng) for _ in range(count)]


def test_blip_finds_the_right_caption_likelier() -> None:
    chosen = scenes(6)
    pictures, texts = [draw.draw(scene, i) for i, scene in enumerate(chosen)], [scene.caption for scene in chosen]
    judge = alignment.load("miniature://blip", None, MINIATURE)
    right, wrong = judge(pictures, texts), judge(pictures, texts[1:] + texts[:1])
    assert right.shape == (6,)
    assert (right <= 0).all()
    assert (right > wrong + 1).all()
    assert np.allclose(judge(pictures[:1], texts[:1]), right[:1], atol=1e-4)  # whatever else is in the batch


def test_the_text_encoder_that_taught_the_model_is_no_judge() -> None:
    with pytest.raises(ValueError, match=r"miniature://clip is the text encoder .* miniature://diffusion was trained under.*try"):
        alignment.load("miniature://clip", None, MINIATURE)


def test_another_clip_is_and_its_score_is_a_cosine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = models.build_clip_tokenizer()
    other = CLIPModel.from_pretrained(locate("miniature://clip"))
    other.text_model.embeddings.token_embedding.weight.data[:, ::2] *= 1.01  # no teacher of ours, nearly as good
    other.save_pretrained(tmp_path)
    models.clip_processor(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chosen = scenes(6)
    pictures, texts = [draw.draw(scene, i) for i, scene in enumerate(chosen)], [scene.caption for scene in chosen]
    judge = alignment.load(str(tmp_path), None, MINIATURE)
    right, wrong = judge(pictures, texts), judge(pictures, texts[1:] + texts[:1])
    assert (np.abs(right) <= 1 + 1e-6).all()
    assert right.mean() > wrong.mean() + 0.1


def test_other_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cannot load"):
        alignment.load(locate("miniature://diffusion"), None, MINIATURE)
    with pytest.raises(ValueError, match="'clip_text_model'; a CLIP, SigLIP or BLIP can judge"):
        alignment.load(locate("miniature://diffusion") + "/text_encoder", None, MINIATURE)
