"""What is seen of a run: pictures over time, an early stop, and a tracker that hears everything."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from momalisa import checkpoint as checkpoints
from momalisa import config
from momalisa.checkpoint import Checkpoint
from momalisa.config import Settings
from momalisa.contact_sheet import GAP_PX, LABEL_PX, SHEET, row_top
from momalisa.latents import TextEncoder
from momalisa.promotion import measure
from momalisa.storage import Store
from momalisa.tracking import Tracker
from momalisa.training import watch as watching
from momalisa.training.run import Plan
from momalisa.training.watch import EarlyStop, Gallery, stalled, watch

PLAN = Plan("run", "e", ())


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path) -> Settings:
    train = config.Train(evaluation_prompts=("a boat", "a tree"), more_prompts=("my own",), evaluation_steps=1, images=64)
    return Settings(
        root=str(tmp_path),
        diffusion=config.Diffusion(model=str(tiny_base)),
        encode=config.Encode(resolution_px=32),
        train=train,
        wandb=config.Wandb(mode="disabled"),
    )


def sheet(settings: Settings) -> Image.Image:
    return Image.open(io.BytesIO(Store(settings.root).read_bytes(f"reports/run/{SHEET}")))


def test_the_sheet_has_a_row_for_each_prompt_and_grows_by_a_column(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = {0: ["red", "green", "blue"], 1: ["white", "black", "red"]}
    for turn, images in enumerate((16, 32)):
        gallery = Gallery(settings, PLAN, Tracker(settings, "run", "train"))  # a new one: the run was resumed
        asked: list[tuple[str, int]] = []

        class Painted:
            def generate(self, requests: list[watching.Request]) -> list[Image.Image]:
                asked.extend((request.prompt, request.seed) for request in requests)  # noqa: B023
                return [Image.new("RGB", (32, 32), colour) for colour in colours[turn]]  # noqa: B023

            def forget_texts(self) -> None: ...

        monkeypatch.setattr(watching.Engine, "load", lambda *_, **__: Painted())
        gallery.hang(images, torch.nn.Linear(1, 1), TextEncoder.load(settings.diffusion))
        assert asked == [("a boat", 1000), ("a tree", 1001), ("my own", 1002)]
        found = sheet(settings)
        columns = (found.width - GAP_PX) // (128 + GAP_PX)
        assert columns == turn + 1
    for column in range(2):
        for row in range(3):
            place = (GAP_PX + column * (128 + GAP_PX) + 64, row_top(row, 128) + LABEL_PX + 64)
            assert found.getpixel(place) == Image.new("RGB", (1, 1), colours[column][row]).getpixel((0, 0))
    store, whole = Store(settings.root), Path(settings.root, "reports/run/000000016.png").read_bytes()
    for number, broken in enumerate((b"", b"no picture", whole[: len(whole) // 2], whole[:60] + b"x" * 90)):
        store.write_bytes(f"reports/run/{number:09d}.png", broken)
    assert gallery.sheet().width == found.width  # they are passed over
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"more_prompts": ()})})
    assert Gallery(other, PLAN, Tracker(other, "run", "train")).sheet().width < found.width  # other rows: another sheet


def test_the_pictures_are_the_engine_s_own(settings: Settings) -> None:
    gallery = Gallery(settings, PLAN, Tracker(settings, "run", "train"))
    unet = checkpoints.load_base_unet(settings.diffusion)
    state = torch.get_rng_state()
    gallery.hang(16, unet, TextEncoder.load(settings.diffusion))
    assert torch.equal(torch.get_rng_state(), state)
    assert strip(settings, 16).size == (32, 96)


def strip(settings: Settings, images: int) -> Image.Image:
    return Image.open(io.BytesIO(Store(settings.root).read_bytes(f"reports/run/{images:09d}.png")))


def test_a_text_encoder_that_learns_shows_in_the_pictures(settings: Settings) -> None:
    train = settings.train.model_copy(update={"evaluation_steps": 4})
    gallery = Gallery(settings.model_copy(update={"train": train}), PLAN, Tracker(settings, "run", "train"))
    unet, text_encoder = checkpoints.load_base_unet(settings.diffusion), TextEncoder.load(settings.diffusion)
    gallery.hang(16, unet, text_encoder)
    gallery.hang(32, unet, text_encoder)
    source = torch.Generator().manual_seed(0)
    for value in text_encoder.model.parameters():
        value.data += torch.randn(value.shape, generator=source)
    gallery.hang(48, unet, text_encoder)
    assert strip(settings, 16).tobytes() == strip(settings, 32).tobytes() != strip(settings, 48).tobytes()


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([], 1, False),
        ([1.0], 1, False),
        ([1.0, 1.0], 1, True),
        ([1.0, 0.9, 0.95], 2, False),
        ([1.0, 0.9, 0.95, 0.91], 2, True),
        ([1.0, 0.9, 0.95, 0.89], 2, False),
    ],
)
def test_stalled(losses: list[float], patience: int, expected: bool) -> None:
    assert stalled(losses, patience) is expected


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(1, 5))
def test_a_falling_loss_never_stalls(losses: list[float], patience: int) -> None:
    assert not stalled(sorted(set(losses), reverse=True), patience)


def test_an_early_stop_is_asked_about_whole_checkpoints(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patient = settings.model_copy(update={"train": settings.train.model_copy(update={"early_stop_patience": 2})})
    store, stop = Store(settings.root), EarlyStop(patient, PLAN)
    losses = {16: 0.5, 32: 0.4, 48: 0.45, 64: 0.43}

    def measured(settings: Settings, planned: Plan, path: str, what: str) -> dict[str, object]:
        assert what == measure.LOSSES
        loss = losses[int(path[-9:])]
        return {"held_out": [loss - 0.1, loss + 0.1]}

    monkeypatch.setattr(measure, "measured", measured)
    folder = Path(settings.root) / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    said = []
    for images in losses:
        entry = Checkpoint(f"checkpoints/run/{images:09d}", "run", images, settings.diffusion.model_dump(), {})
        checkpoints.write(store, entry, folder)
        said.append(stop(images))
    assert said == [False, False, False, True]
    assert "not improved for 2 checkpoints (lowest 0.40000, now 0.43000); ends after 64 images" in capsys.readouterr().out
    assert not EarlyStop(settings, PLAN)(64)  # without patience


def test_only_the_main_process_shows_anything(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[dict[str, float]] = []
    with watch(settings, PLAN, enabled=False, heard=heard.append) as events:
        events.logged({"loss": 0.5, "images_seen": 32})
    assert heard == []
    with watch(settings, PLAN, enabled=True, heard=heard.append) as events:
        events.logged({"loss": 0.5, "images_seen": 32})
        entry = Checkpoint("checkpoints/run/000000032", "run", 32, settings.diffusion.model_dump(), {"x": "0"})
        events.checkpointed(replace(entry, training={"dataset": "d" * 64}))
    assert heard == [{"loss": 0.5, "images_seen": 32}]
    said = capsys.readouterr().out
    assert "train: checkpoint run@32" in said
    assert "train: 32/64 images, loss 0.5000" in said
