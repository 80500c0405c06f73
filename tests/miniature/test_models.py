"""The miniature's tokenizers take any text, and its architectures are the published ones in small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer, CLIPTokenizer

from momalisa.config import EVALUATION_PROMPTS
from momalisa.miniature import draw, models
from momalisa.weights import MINIATURE

texts = st.text(max_size=60)  # any code point but surrogates


@pytest.fixture(scope="module")
def clip_tokenizer() -> CLIPTokenizer:
    return models.build_clip_tokenizer()


@pytest.fixture(scope="module")
def blip_tokenizer() -> BertTokenizer:
    return models.build_blip_tokenizer()


@settings(deadline=None)
@given(text=texts)
@example("🎨👩‍🎨 Ünïcode naïve 漢字 \x00\x7f\t\n")
@example("x" * 1000)
@example("")
def test_clip_tokenizes_any_text_and_knows_all_of_it(clip_tokenizer: CLIPTokenizer, text: str) -> None:
    ids = clip_tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == 77
    assert ids[0] == clip_tokenizer.bos_token_id
    assert max(ids) < len(clip_tokenizer)
    words = list(ids[1 : ids.index(clip_tokenizer.eos_token_id)])
    assert words or not any(character.isalnum() for character in text)
    assert text or not words


@settings(deadline=None)
@given(text=texts)
@example("🎨👩‍🎨 漢字 \x00\x7f\t\n")
@example("")
def test_blip_tokenizes_any_text(blip_tokenizer: BertTokenizer, text: str) -> None:
    ids = blip_tokenizer(text, truncation=True).input_ids
    assert len(ids) <= 64
    assert max(ids) < len(blip_tokenizer)


def test_captions_go_through_both_tokenizers_and_back(clip_tokenizer: CLIPTokenizer, blip_tokenizer: BertTokenizer) -> None:
    for scene in draw.all_scenes():
        prompt = models.EVALUATION_PREFIX + scene.caption
        ids = clip_tokenizer(prompt).input_ids
        assert len(ids) <= 30, scene.caption
        assert clip_tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == prompt.lower().replace(" ", "")
        words = blip_tokenizer(scene.caption).input_ids
        assert blip_tokenizer.unk_token_id not in words
        assert blip_tokenizer.decode(words, skip_special_tokens=True).replace(" ,", ",") == scene.caption


def test_the_tokenizers_are_the_same_on_every_build(clip_tokenizer: CLIPTokenizer, blip_tokenizer: BertTokenizer) -> None:
    for _ in range(5):  # ids are what weights were trained with
        assert models.build_clip_tokenizer().get_vocab() == clip_tokenizer.get_vocab()
    assert models.build_blip_tokenizer().get_vocab() == blip_tokenizer.get_vocab()
    assert clip_tokenizer.bos_token_id != clip_tokenizer.eos_token_id


@pytest.mark.skipif(not MINIATURE.exists(), reason="the weights are not trained yet")
def test_the_packages_weights_know_captions_by_the_same_ids(clip_tokenizer: CLIPTokenizer) -> None:
    for folder in ("diffusion/tokenizer", "clip"):
        assert (
            CLIPTokenizer.from_pretrained(MINIATURE / folder)(models.corpus()).input_ids
            == clip_tokenizer(models.corpus()).input_ids
        )


def test_the_prefix_and_subjects_are_those_of_the_settings() -> None:
    assert tuple(models.EVALUATION_PREFIX + subject for subject in models.EVALUATION_SUBJECTS) == EVALUATION_PROMPTS


def test_the_schedule_is_stable_diffusions() -> None:
    config = models.build_scheduler().config
    expected = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "prediction_type": "epsilon",
        "skip_prk_steps": True,
    }
    assert {key: config[key] for key in expected} == expected


def test_the_text_encoder_is_clips_text_half(clip_tokenizer: CLIPTokenizer) -> None:
    clip = models.build_clip(clip_tokenizer).eval()
    inputs = clip_tokenizer(["a red boat", "trees"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        ours = models.text_encoder_of(clip)(input_ids=inputs.input_ids).last_hidden_state
        theirs = clip.text_model(input_ids=inputs.input_ids).last_hidden_state
    torch.testing.assert_close(ours, theirs)


def test_all_weights_stay_small(clip_tokenizer: CLIPTokenizer, blip_tokenizer: BertTokenizer) -> None:
    clip = models.build_clip(clip_tokenizer)
    parts = [models.build_vae(), models.build_unet(), clip, models.text_encoder_of(clip), models.build_blip(blip_tokenizer)]
    counted = [sum(value.numel() for value in part.parameters()) for part in parts]
    assert 2 * sum(counted) < 25_000_000  # bytes, two a weight
