"""The artist: every caption its own, every scene drawable, every drawing repeatable."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from momalisa.config import EVALUATION_PROMPTS
from momalisa.miniature import draw
from momalisa.miniature.draw import Scene, all_scenes, held_out_scenes, scene_of, subject_of, training_scenes

scenes = st.sampled_from(all_scenes())


def pixels(scene: Scene, seed: int) -> np.ndarray:
    return np.asarray(draw.draw(scene, seed), np.int16)


def test_every_caption_is_said_of_one_scene() -> None:
    captions = [scene.caption for scene in all_scenes()]
    assert len(captions) == len(set(captions)) == 1096
    assert all(caption == " ".join(caption.split()) for caption in captions)


def test_three_hundred_scenes_are_held_out_of_training() -> None:
    held_out, training = set(held_out_scenes()), set(training_scenes())
    assert len(held_out) == len(held_out_scenes()) == draw.HELD_OUT_COUNT == 300
    assert not held_out & training
    assert held_out | training == set(all_scenes())


def test_training_meets_every_word_of_the_held_out_captions() -> None:
    words = {word for scene in training_scenes() for word in scene.caption.split()}
    assert {word for scene in held_out_scenes() for word in scene.caption.split()} <= words
    assert {scene.subject for scene in held_out_scenes()} == {scene.subject for scene in training_scenes()}


def test_every_scene_can_be_drawn() -> None:
    for scene in all_scenes():
        picture = draw.draw(scene, seed=0)
        assert (picture.size, picture.mode) == ((draw.SIZE_PX, draw.SIZE_PX), "RGB")
        assert len(picture.getcolors(draw.SIZE_PX**2)) > 1, scene.caption


@given(scene=scenes, seed=st.integers())
def test_the_same_scene_and_seed_are_the_same_drawing(scene: Scene, seed: int) -> None:
    random.seed(seed)  # whatever else is drawn
    first = draw.draw(scene, seed).tobytes()
    assert draw.draw(scene, seed).tobytes() == first
    assert draw.draw(scene, seed + 1).tobytes() != first


def test_what_a_caption_says_shows() -> None:
    """A colour that is named covers part of the picture; another count covers another part."""
    for name, colour in draw.COLOURS.items():
        other = "white" if name != "white" else "blue"
        scene = scene_of(f"two {name} squares on a {other} ground")
        assert scene is not None
        near = (np.abs(pixels(scene, 3) - np.array(colour)).max(axis=2) <= 12).mean()
        assert 0.08 < near < 0.4, name
    seasons = [scene_of(f"a tree in {season} under a blue sky") for season in draw.SEASONS]
    drawn = [pixels(scene, 1) for scene in seasons if scene]
    assert len(drawn) == 4
    assert all(np.abs(a - b).mean() > 5 for i, a in enumerate(drawn) for b in drawn[:i])


@given(scene=scenes)
def test_a_caption_leads_back_to_its_scene_and_subject(scene: Scene) -> None:
    assert scene_of(scene.caption) is scene
    assert scene_of(f"  {scene.caption.replace(' ', '  ')} ") is scene
    assert subject_of(scene.caption) == scene.subject
    assert subject_of(scene.caption.upper()) == scene.subject


@given(text=st.text())
def test_any_other_text_has_no_scene(text: str) -> None:
    assert scene_of(text + "?") is None
    assert subject_of(text) in {None, *(scene.subject for scene in all_scenes())}


@pytest.mark.parametrize(
    ("text", "subject"), [("a red red boat", "boat"), ("nested squares", "nested"), ("a cat", None), ("", None)]
)
def test_a_subject_is_seen_where_the_other_words_fit_no_scene(text: str, subject: str | None) -> None:
    assert subject_of(text) == subject


def test_evaluation_prompts_are_names_of_kinds_of_pictures() -> None:
    aliases = {scene.alias for scene in all_scenes()} - {None}
    assert {f"A MOMA artwork of: {alias}" for alias in aliases} == set(EVALUATION_PROMPTS)


def test_half_of_the_sample_is_countable_shapes_and_none_is_held_out() -> None:
    rng = random.Random(1)
    sample = [draw.sample_scene(rng) for _ in range(1000)]
    assert 0.45 < np.mean([scene.subject in draw.SHAPES for scene in sample]) < 0.55
    assert not set(sample) & set(held_out_scenes())
    boats = tuple(scene for scene in all_scenes() if scene.subject == "boat")
    assert draw.sample_scene(rng, boats) in boats
