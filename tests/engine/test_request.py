"""Requests that cannot be, and what a picture's file says about the request that made it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from momalisa.engine import SAMPLERS, Engine, Request, from_parameters, to_parameters
from tests.engine.conftest import half_mask, photograph

REQUEST = Request("a red boat", seed=7, steps=4, size_px=64)
PHOTOGRAPH, MASK = photograph(1), half_mask()


@given(
    st.builds(
        Request,
        prompt=st.text(),
        seed=st.integers(0, 2**64 - 1),
        steps=st.integers(1, 999),
        guidance_scale=st.floats(1, 100),
        negative_prompt=st.text(),
        size_px=st.just(64),
        sampler=st.sampled_from(SAMPLERS),
        reproducible=st.booleans(),
        adapter=st.none() | st.just("waves/640"),
        guidance_interval=st.just((0.0, math.inf)) | st.tuples(st.floats(0, 1), st.floats(1, 20)),
    ),
    st.floats(0, 1),
    st.sampled_from([(None, None), (PHOTOGRAPH, None), (PHOTOGRAPH, MASK)]),
)
def test_a_file_says_enough_to_make_the_picture_again(
    request_: Request, strength: float, given_: tuple[Image.Image | None, Image.Image | None]
) -> None:
    image, mask = given_
    asked = replace(request_, image=image, mask=mask, strength=strength if image else Request.strength, previews=2)
    fields = to_parameters(asked)
    assert all(isinstance(value, str) for value in fields.values())
    assert from_parameters({**fields, "checkpoint": "demo-64"}, image, mask) == replace(asked, previews=0)


def test_another_image_than_the_one_that_went_in() -> None:
    fields = to_parameters(replace(REQUEST, image=PHOTOGRAPH))
    with pytest.raises(ValueError, match=f"made with image {fields['image']}, and none was given"):
        from_parameters(fields)
    with pytest.raises(ValueError, match="made with image"):
        from_parameters(fields, photograph(2))
    with pytest.raises(ValueError, match="made with mask none"):
        from_parameters(fields, PHOTOGRAPH, MASK)


@pytest.mark.parametrize("name", ["prompt", "seed", "steps", "guidance_scale", "size_px", "sampler"])
def test_a_file_that_was_not_made_here(name: str) -> None:
    fields = to_parameters(REQUEST)
    del fields[name]
    with pytest.raises(ValueError, match=f"does not say its {name}"):
        from_parameters(fields)
    with pytest.raises(ValueError, match="sampler='magic' is not one of"):
        from_parameters({**to_parameters(REQUEST), "sampler": "magic"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": 1000}, "steps=1000 is more than 999"),
        ({"size_px": 63}, "size_px=63 is not a multiple of 8; try 64"),
        ({"size_px": 0}, "size_px=0 is not a multiple of 8; try 8"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5 must be at least 1"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan must be at least 1"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf must be at least 1"),
        ({"seed": -1}, "seed=-1 must be between 0 and"),
        ({"seed": 2**64}, "must be between 0 and"),
        ({"previews": -1}, "previews=-1 must be 0 or more"),
        ({"sampler": "magic"}, "sampler='magic' is not one of ddim, euler"),
        ({"mask": MASK}, "a mask without an image"),
        ({"image": photograph(1, 96)}, "the image is 96x96 RGB; it must be 64x64 RGB"),
        ({"image": PHOTOGRAPH.convert("RGBA")}, "the image is 64x64 RGBA"),
        ({"image": PHOTOGRAPH, "mask": half_mask(72)}, "the mask is 72x72 L; it must be 64x64 L"),
        ({"image": PHOTOGRAPH, "mask": PHOTOGRAPH}, "the mask is 64x64 RGB"),
        ({"image": PHOTOGRAPH, "strength": 0.2}, "strength=0.2 of 4 steps must be one step at least"),
        ({"image": PHOTOGRAPH, "strength": 1.5}, "strength=1.5 of 4 steps"),
        ({"image": PHOTOGRAPH, "strength": math.nan}, "strength=nan"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval=.* must be two noise levels"),
        ({"guidance_interval": (math.nan, 1.0)}, "guidance_interval="),
    ],
)
def test_impossible_requests(engine: Engine, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(replace(REQUEST, **wrong))
    assert engine.idle
