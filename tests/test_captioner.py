"""Captions equal plain transformers', whatever the batch, and their id follows everything that shapes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

from momalisa.captioner import Captioner, captioner_id
from momalisa.config import Caption
from momalisa.miniature import draw

PICTURES = [draw.draw(scene, seed=1) for scene in draw.all_scenes()[::80]]


@pytest.fixture
def settings(tiny_blip: Path) -> Caption:
    return Caption(model=str(tiny_blip), max_new_tokens=8)


def by_transformers(settings: Caption, picture: Image.Image) -> str:
    """The model card's way: the processor's pixels, `generate` without a prompt, decode."""
    model = BlipForConditionalGeneration.from_pretrained(settings.model, dtype=torch.float32)
    pixels = BlipImageProcessorPil.from_pretrained(settings.model)(images=picture, return_tensors="pt").pixel_values
    ids = model.generate(pixel_values=pixels, max_new_tokens=settings.max_new_tokens)
    return str(BertTokenizer.from_pretrained(settings.model).decode(ids[0], skip_special_tokens=True))


def test_captions_equal_plain_transformers(settings: Caption) -> None:
    captions = Captioner.load(settings).caption(PICTURES)
    expected = [by_transformers(settings, picture) for picture in PICTURES]
    assert captions == [settings.prefix + " ".join(text.split()) for text in expected]
    assert len(set(captions)) > 1


def test_a_caption_does_not_depend_on_its_batch(settings: Caption) -> None:
    captioner = Captioner.load(settings)
    assert captioner.caption(PICTURES) == [captioner.caption([picture])[0] for picture in PICTURES]
    assert captioner.caption([]) == []


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode_are_captioned(settings: Caption, mode: str) -> None:
    assert Captioner.load(settings).caption([PICTURES[0].convert(mode)])[0].startswith(settings.prefix)


def test_a_model_that_says_nothing_gives_an_empty_text(settings: Caption) -> None:
    captioner = Captioner.load(settings)
    with torch.no_grad():
        captioner.model.text_decoder.cls.predictions.bias[captioner.tokenizer.sep_token_id] = 1e6
    assert captioner.caption(PICTURES[:2]) == ["", ""]


def test_too_many_tokens_are_refused(tiny_blip: Path) -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens=64 does not fit .* 64 positions; try 63 or less"):
        Captioner.load(Caption(model=str(tiny_blip), max_new_tokens=64))


def test_the_id_follows_what_shapes_a_caption(settings: Caption) -> None:
    name = captioner_id(settings)
    assert len(name) == 12
    assert name == captioner_id(settings.model_copy(update={"batch": 3, "actors": 7}))
    changes = [{"prefix": "a "}, {"max_new_tokens": 9}, {"model": "owner/name"}, {"model": "owner/name", "revision": "abc"}]
    assert len({name, *(captioner_id(settings.model_copy(update=change)) for change in changes)}) == 5


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing-here' is neither a folder here nor a hub name"):
        captioner_id(Caption(model=f"{tmp_path}/nothing-here"))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}: "):
        Captioner.load(Caption(model=str(tmp_path)))


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"cannot load nobody/nothing@abc: .*check its name and revision, the network, and HF_TOKEN"
    ):
        Captioner.load(Caption(model="nobody/nothing", revision="abc"))
