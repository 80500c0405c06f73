"""General prompts for prior preservation: what the base should go on drawing as it did."""

from __future__ import annotations

import itertools

SUBJECTS = (
    "a dog", "two cats", "a horse on a hill", "a bowl of fruit", "an old man", "a child laughing", "a street at night",
    "a mountain lake", "a city skyline", "a red car", "a wooden chair", "a bridge over a river", "a crowd of people",
    "a ship at sea", "a garden in spring", "a plate of food", "a bird on a branch", "an empty room", "a castle", "a robot",
)  # fmt: skip
STYLES = ("a photo of {}", "an oil painting of {}", "a pencil drawing of {}", "{}", "a close-up of {}, soft light")

PROMPTS = tuple(style.format(subject) for subject, style in itertools.product(SUBJECTS, STYLES))
