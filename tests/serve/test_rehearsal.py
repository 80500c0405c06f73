"""What a checkpoint paints for nobody before anybody may see it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from momalisa.config import Diffusion
from momalisa.engine import Engine, GenerationError
from serve.loaded_checkpoint import LoadedCheckpoint
from serve.rehearsal import warm_up
from tests.serve.conftest import LIMITS


@pytest.fixture
def checkpoint(tiny_base: Path) -> Iterator[LoadedCheckpoint]:
    engine = Engine.load(Diffusion(model=str(tiny_base)))
    yield LoadedCheckpoint(engine, "tiny-64", "checkpoints/tiny/64")
    engine.close()


def test_a_whole_picture_is_painted_and_all_that_the_first_visitor_needs_is_there(
    checkpoint: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    unet, forward = checkpoint.engine.unet, checkpoint.engine.unet.forward

    def counted(sample: torch.Tensor, *args: Any, **more: Any) -> Any:
        rows.append(len(sample))
        return forward(sample, *args, **more)

    monkeypatch.setattr(unet, "forward", counted)
    warm_up(checkpoint, LIMITS.model_copy(update={"steps": 4, "guidance_scale": 3.0}))
    assert checkpoint.engine._projection is not None
    assert checkpoint.engine.idle
    assert rows == [5, 2, 2, 2]


def test_one_flat_colour_is_no_picture(checkpoint: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = checkpoint.engine.autoencoder
    monkeypatch.setattr(vae, "decode", lambda latents: torch.zeros((len(latents), 3, 64, 64)))
    with pytest.raises(GenerationError, match="one flat colour"):
        warm_up(checkpoint, LIMITS)


def test_what_the_check_has_to_say_about_it_is_no_failure(checkpoint: LoadedCheckpoint) -> None:
    asked: list[tuple[int, int]] = []
    checkpoint.check = lambda picture: (asked.append(picture.size), "withheld")[1]
    warm_up(checkpoint, LIMITS)
    assert asked == [(64, 64)]
