"""The settings that we ship can use every rule, and each of them is documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from momalisa.config import Promote, from_file

HOME = Path(__file__).parents[2]
FULL_SIZE = sorted((HOME / "configs").glob("sd14*.yaml"))


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_at_full_size_every_gate_is_on_and_ties_can_be_broken(path: Path) -> None:
    chosen = from_file(str(path)).promote
    assert chosen.gate_pictures > 0
    assert chosen.general_pictures == 200
    assert chosen.distance_pictures >= chosen.tie_pictures
    assert chosen.clip_model is not None
    assert chosen.alignment_model not in (None, chosen.clip_model)  # that one is the model's own text encoder
    for revision in (chosen.clip_revision, chosen.alignment_revision):
        assert re.fullmatch("[0-9a-f]{40}", str(revision))


def test_the_full_size_configurations_are_these() -> None:
    assert {path.stem for path in FULL_SIZE} == {"sd14", "sd14-24gb", "sd14-lora"}


def test_every_option_is_documented() -> None:
    text = (HOME / "docs" / "promotion.md").read_text()
    assert [name for name in Promote.model_fields if not re.search(rf"^\|.*`{name}`.*\|.*\|", text, re.MULTILINE)] == []
