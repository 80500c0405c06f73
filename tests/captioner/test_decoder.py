"""Our decoding says, word for word, what transformers' greedy generate says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipImageProcessorPil

from momalisa.captioner.agreement import agreement, generate
from momalisa.captioner.decoder import Decoder
from momalisa.captioner.vision import VisionTower
from momalisa.miniature import draw
from momalisa.square import Square
from momalisa.weights import locate

TOKENS = 40
LOGITS = 2e-4  # fp32, on values up to about 20


@pytest.fixture(scope="module")
def blip() -> Any:
    torch.set_num_threads(1)
    model = BlipForConditionalGeneration.from_pretrained(locate("miniature://blip"), dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vision(blip: Any) -> VisionTower:
    processor = BlipImageProcessorPil()
    return VisionTower(blip.vision_model, processor.image_mean, processor.image_std)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    scenes = draw.all_scenes()
    drawn = [Square(128)(draw.draw(scenes[number * 41 % len(scenes)], seed=number)) for number in range(24)]
    return torch.from_numpy(np.stack(drawn))


def decoder(blip: Any, vision: VisionTower, tokens: int = TOKENS, capacity: int = 24) -> Decoder:
    return Decoder(blip.text_decoder, vision.tokens, tokens, capacity)


def test_states_are_the_models_own(blip: Any, vision: VisionTower, pixels: torch.Tensor) -> None:
    with torch.no_grad():
        theirs = blip.vision_model(pixel_values=vision.normalised(pixels))[0]
        torch.testing.assert_close(vision(pixels), theirs, rtol=1e-5, atol=1e-4)


def test_every_word_is_the_reference_s(blip: Any, vision: VisionTower, pixels: torch.Tensor) -> None:
    found = agreement(blip, vision, decoder(blip, vision), pixels)
    print(found)
    assert found.different == 0
    assert found.equal >= len(pixels) - 1  # near ties are rare in a trained model
    assert found.logits < LOGITS


def test_rows_that_end_leave_and_the_others_go_on(
    blip: Any, vision: VisionTower, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, sizes = decoder(blip, vision), []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, rows: (sizes.append(rows), step(self, rows))[1])
    ids = ours(vision(pixels))
    lengths = (ids != ours.pad_id).sum(dim=1)
    assert len(set(lengths.tolist())) > 2
    assert len(sizes) == lengths.max()  # no step after the longest caption's end
    assert sizes[0] == len(pixels)
    assert sizes[-1] <= len(pixels) // 2
    for count, steps in zip(sizes, range(len(sizes)), strict=True):
        going = int((lengths > steps).sum())
        assert going <= count < 2 * max(going, 1) + 1


def test_a_batch_is_its_rows_alone_in_any_order(blip: Any, vision: VisionTower, pixels: torch.Tensor) -> None:
    ours = decoder(blip, vision)
    states = vision(pixels)
    ids = ours(states)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(states[order]), ids[order])
    assert torch.equal(torch.cat([ours(row[None]) for row in states[:4]]), ids[:4])  # nothing stays from the batch before


def test_a_batch_filled_up_for_a_graph_says_the_same(
    blip: Any, vision: VisionTower, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = vision(pixels[:11])
    expected = decoder(blip, vision)(states)
    monkeypatch.setattr(Decoder, "fit", lambda self, count: 1 << (count - 1).bit_length())
    filled = decoder(blip, vision, capacity=16)
    filled.image.normal_(generator=torch.Generator().manual_seed(0))  # what an earlier batch left in the rows beyond this one
    assert torch.equal(filled(states), expected)

    filled.begin(states[:7], 8)
    assert filled.ended[:8].tolist() == [False] * 7 + [True]  # what fills a batch up counts as ended
    filled.keep(torch.tensor([1, 2, 5]), 4)
    assert filled.ended[:4].tolist() == [False] * 3 + [True]
    assert torch.equal(filled.image[:, :, 2], filled.image[:, :, 5])


def test_a_caption_that_never_ends_is_cut(blip: Any, vision: VisionTower, pixels: torch.Tensor) -> None:
    ours = decoder(blip, vision, tokens=3)
    reference, _ = generate(blip, vision.normalised(pixels), 3)
    assert torch.equal(ours(vision(pixels)), reference)


def test_too_many_tokens_are_refused(blip: Any, vision: VisionTower) -> None:
    with pytest.raises(ValueError, match="max_new_tokens=64 does not fit a decoder with 64 positions; try 63 or less"):
        decoder(blip, vision, tokens=64)


@pytest.mark.gpu
def test_graphs_say_what_transformers_says(blip: Any, pixels: torch.Tensor) -> None:
    model = BlipForConditionalGeneration.from_pretrained(locate("miniature://blip"), dtype=torch.float32).eval().to("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    processor = BlipImageProcessorPil()
    vision = VisionTower(model.vision_model, processor.image_mean, processor.image_std)
    ours = decoder(model, vision)
    for part in (pixels, pixels[:5], pixels):
        found = agreement(model, vision, ours, part)
        assert found.different == 0
        assert found.logits < 1e-3
