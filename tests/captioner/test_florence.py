"""Detailed captions equal plain transformers', from a folder in Florence-2's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, Florence2ForConditionalGeneration, Florence2Processor

from momalisa.captioner.florence import Florence, load_processor, square_of
from momalisa.config import Caption
from momalisa.miniature import draw

PICTURES = [draw.draw(scene, seed=1) for scene in draw.all_scenes()[::150]]


@pytest.fixture
def settings(tiny_florence: Path) -> Caption:
    return Caption(long_model=str(tiny_florence), long_max_new_tokens=12)


def by_transformers(settings: Caption, pictures: list[Image.Image]) -> list[str]:
    """The model card's way."""
    where = settings.long_model
    parts = CLIPImageProcessorPil.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    processor = Florence2Processor(*parts, post_processor_config={"pure_text": {}})
    model = Florence2ForConditionalGeneration.from_pretrained(where, dtype=torch.float32)
    inputs = processor(text=[settings.long_prompt] * len(pictures), images=pictures, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=settings.long_max_new_tokens, do_sample=False, num_beams=1)
    texts = processor.batch_decode(ids, skip_special_tokens=False)
    size = pictures[0].size
    answers = [processor.post_process_generation(text, task=settings.long_prompt, image_size=size) for text in texts]
    return [" ".join(answer[settings.long_prompt].replace("<pad>", " ").split()) for answer in answers]


@pytest.mark.parametrize("prompt", ["<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"])
def test_texts_equal_plain_transformers(settings: Caption, prompt: str) -> None:
    chosen = settings.model_copy(update={"long_prompt": prompt})
    florence = Florence.load(chosen)
    pixels = torch.stack([torch.from_numpy(florence.square(picture).copy()) for picture in PICTURES])
    texts = florence.generate(pixels)
    assert texts == by_transformers(chosen, PICTURES)
    assert len(set(texts)) > 1
    assert florence.generate(pixels[1:2]) == texts[1:2]


def test_the_prompts_words_reach_the_model(settings: Caption) -> None:
    florence = Florence.load(settings)
    prompt = florence.processor.tokenizer.decode(florence.input_ids[0], skip_special_tokens=True)
    assert "Describe in detail what is shown in the image." in prompt


def test_it_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match="long_model is not set; try florence-community/Florence-2-base"):
        Florence.load(Caption())


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}: "):
        load_processor(Caption(long_model=str(tmp_path)))


def test_a_processor_that_crops_is_refused() -> None:
    with pytest.raises(ValueError, match="makes no plain squares"):
        square_of(CLIPImageProcessorPil())
