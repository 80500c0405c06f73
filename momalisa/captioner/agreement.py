"""Does our decoding say what transformers' greedy `generate` says? The evidence that tests and the bench ask for.

Two ways to sum the same numbers differ in the last bits, so where the reference's two best words are nearly equal
either may win, and what follows differs. Such rows are counted apart, not passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momalisa.captioner.decoder import Decoder
from momalisa.captioner.vision import VisionTower

NEAR = 1e-4  # logits closer than this are a tie


@dataclass(frozen=True)
class Agreement:
    """Rows, by what became of them, and the largest difference of a logit along the reference's own words."""

    equal: int
    near_ties: int  # rows whose first other word stands where the reference was undecided
    different: int
    logits: float


@torch.no_grad()
def agreement(model: Any, vision: VisionTower, decoder: Decoder, pixels: Tensor) -> Agreement:
    """`model`: the `BlipForConditionalGeneration` whose weights the other two use; pixels [B, S, S, 3] uint8."""
    reference, scores = generate(model, vision.normalised(pixels.to(vision.device)), decoder.max_new_tokens)
    states = vision(pixels)
    ours, length = decoder(states), reference.shape[1]
    assert (ours[:, length:] == decoder.pad_id).all()
    equal = near = 0
    for mine, theirs, row_scores in zip(ours, reference, scores, strict=True):
        other = (mine[:length] != theirs).nonzero()
        if not len(other):
            equal += 1
            continue
        best, second = row_scores[other[0, 0]].topk(2).values
        near += bool(best - second < NEAR)
    largest = logits_difference(decoder, states, reference, scores)
    return Agreement(equal, near, len(ours) - equal - near, largest)


def generate(model: Any, pixel_values: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """The model card's call: token ids [B, t] without the start token, logits [B, t, V] float32, both on the CPU."""
    made = model.generate(
        pixel_values=pixel_values,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences[:, 1:].cpu(), torch.stack(made.logits, dim=1).float().cpu()


def logits_difference(decoder: Decoder, states: Tensor, words: Tensor, scores: Tensor) -> float:
    """Step through the reference's words [B, t]; rows count up to the end of their caption."""
    rows, largest = len(states), 0.0
    going = torch.ones(rows, dtype=torch.bool)
    decoder.begin(states, rows)
    for step, word in enumerate(words.unbind(1)):
        difference = (decoder.logits(rows).float().cpu() - scores[:, step]).abs()[going]
        largest = max(largest, float(difference.max()))
        going &= word != decoder.end_id
        if not going.any():
            break
        decoder.last[:rows] = word.to(decoder.device)
        decoder.position += 1
    return largest
