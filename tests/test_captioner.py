"""Captions equal plain transformers', whatever the batch, and their id follows everything that shapes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

from momalisa.captioner import Captioner, captioner_id, load_processors
from momalisa.config import Caption, Diffusion, Settings
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
    model = BlipForConditionalGeneration.from_pretrained(settings.model, dtype=torch.float32)
    processor, tokenizer = load_processors(settings)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[tokenizer.sep_token_id] = 1e6
    assert Captioner(model, processor, tokenizer, settings).caption(PICTURES[:2]) == ["", ""]


def test_too_many_tokens_are_refused(tiny_blip: Path) -> None:
    with pytest.raises(ValueError, match="max_new_tokens=64 does not fit a decoder with 64 positions; try 63 or less"):
        Captioner.load(Caption(model=str(tiny_blip), max_new_tokens=64))


def test_more_pictures_than_a_batch_are_captioned(settings: Caption) -> None:
    in_twos = Captioner.load(settings.model_copy(update={"batch": 2}))
    assert in_twos.caption(PICTURES[:5]) == Captioner.load(settings).caption(PICTURES[:5])


def test_half_precision_is_a_setting(settings: Caption) -> None:
    captioner = Captioner.load(settings.model_copy(update={"precision": "bf16"}))
    assert captioner.vision.dtype == captioner.decoder.dtype == torch.bfloat16
    assert all(text.startswith(settings.prefix) for text in captioner.caption(PICTURES))


def named(chosen: Caption, base: Path, **changes: object) -> str:
    return captioner_id(Settings(caption=chosen.model_copy(update=changes), diffusion=Diffusion(model=str(base))))


def test_the_id_follows_what_shapes_a_row(settings: Caption, tiny_base: Path) -> None:
    name = named(settings, tiny_base)
    assert len(name) == 12
    for how in ({"batch": 3, "actors": 7}, {"cpus_per_decoder": 2.0}, {"long_prompt": "<MORE_DETAILED_CAPTION>"}):
        assert named(settings, tiny_base, **how) == name  # without a long_model its prompt shapes nothing
    long = {"long_model": "owner/long"}
    changes = [
        {"prefix": "a "}, {"max_new_tokens": 9}, {"precision": "bf16"}, {"model": "owner/name"},
        {"model": "owner/name", "revision": "abc"}, long, {**long, "long_revision": "abc"},
        {**long, "long_prompt": "<MORE_DETAILED_CAPTION>"}, {**long, "long_max_new_tokens": 9},
    ]  # fmt: skip
    assert len({name, *(named(settings, tiny_base, **change) for change in changes)}) == 1 + len(changes)


def test_the_id_follows_the_tokenizer_of_fused_texts_alone(settings: Caption, tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    name = named(settings, tiny_base)
    (copy / "unet" / "config.json").write_text("{}")
    assert named(settings, copy) == name
    (tmp_path / "other").symlink_to(copy)  # identities are remembered by path
    (copy / "tokenizer" / "more.txt").write_text("x")
    assert named(settings, tmp_path / "other") != name


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing-here' is neither a folder here nor a hub name"):
        captioner_id(Settings(caption=Caption(model=f"{tmp_path}/nothing-here")))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}: "):
        Captioner.load(Caption(model=str(tmp_path)))


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"cannot load nobody/nothing@abc: .*check its name and revision, the network, and HF_TOKEN"
    ):
        Captioner.load(Caption(model="nobody/nothing", revision="abc"))
