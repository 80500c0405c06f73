"""The trainer of the miniature: killed and started again it makes the same weights, in layouts that everyone loads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPModel, CLIPProcessor

from momalisa.miniature import draw, train
from momalisa.miniature.train import RECIPES, Recipe

CPU = torch.device("cpu")
TINY = {name: Recipe(steps=4, plain_steps=2, batch=2, learning_rate=1e-3) for name in RECIPES}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(train, "DRAWINGS", 4)
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", -1.0)  # after each step


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four models after four steps each."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "DRAWINGS", 4)
        torch.set_num_threads(1)
        for name, recipe in TINY.items():
            train.fit(name, recipe, folder, CPU)
    return folder


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A state's leaves by their path, without the time it took."""
    leaves: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}/")
        elif key != "seconds":
            leaves[f"{prefix}{key}"] = value
    return leaves


@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_started_again_it_makes_the_same_weights(
    work: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("clip.pt", "vae.pt", "latents.pt"):
        if not name.startswith(other.split(".")[0]):
            (tmp_path / other).write_bytes((work / other).read_bytes())
    save, saves = train.save_state, []

    def killed(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        saves.append(state["step"])
        if state["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train.fit(name, TINY[name], tmp_path, CPU)
    train.fit(name, TINY[name], tmp_path, CPU)
    assert saves == [1, 2, 3, 4]
    expected, found = (flat(train.load_state(folder / f"{name}.pt")) for folder in (work, tmp_path))
    assert set(found) == set(expected)
    for key, value in expected.items():
        same = torch.equal(value, found[key]) if isinstance(value, torch.Tensor) else value == found[key]
        assert same, key
    moved = [
        key for key, value in expected.items() if key.startswith("model/") and not torch.equal(value, expected[f"ema/{key[6:]}"])
    ]
    assert moved


def test_a_trained_model_is_left_as_it_is(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (work / "vae.pt").stat().st_mtime_ns
    train.fit("vae", TINY["vae"], work, CPU)
    assert "vae: already trained for 4 steps" in capsys.readouterr().out
    assert (work / "vae.pt").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def exported(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weights")
    train.export(work, out, TINY)
    return out


def test_the_diffusion_model_is_loaded_by_plain_diffusers(exported: Path, work: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = StableDiffusionPipeline.from_pretrained(exported / "diffusion", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.safety_checker is None
    latents = train.load_state(work / "latents.pt")
    assert pipeline.vae.config.scaling_factor == train.latent_scaling_factor(latents["mean"], latents["std"])
    ema = train.load_state(work / "unet.pt")["ema"]
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, ema[name], rtol=1e-3, atol=1e-4)
    picture = pipeline("a red boat on a blue sea", num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0]
    assert picture.size == (128, 128)


def test_clip_and_blip_are_loaded_by_plain_transformers(exported: Path) -> None:
    picture = draw.draw(draw.all_scenes()[0], seed=1)
    clip, clip_processor = CLIPModel.from_pretrained(exported / "clip"), CLIPProcessor.from_pretrained(exported / "clip")
    inputs = clip_processor(text=["a red boat", "x"], images=picture, return_tensors="pt", padding=True)
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)
    with torch.no_grad():
        assert clip.float()(**inputs).logits_per_image.shape == (1, 2)
    blip = BlipForConditionalGeneration.from_pretrained(exported / "blip").float().eval()
    blip_processor = BlipProcessor.from_pretrained(exported / "blip")
    pixel_values = blip_processor(images=picture, return_tensors="pt")["pixel_values"]
    words = blip.generate(pixel_values=pixel_values, max_new_tokens=3)
    assert isinstance(blip_processor.decode(words[0], skip_special_tokens=True), str)


def test_the_training_record_names_these_weights(exported: Path) -> None:
    record = json.loads((exported / "training.json").read_text())
    assert record["revision"] == train.revision(exported)
    assert record["models"]["unet"]["steps"] == 4
    assert record["models"]["vae"]["loss"][-1][0] == 4
    assert record["held_out_captions"] == 300
    assert sum(path.stat().st_size for path in exported.rglob("*.safetensors")) < 25_000_000
    one = next(exported.rglob("*.safetensors"))
    original = one.read_bytes()
    one.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        assert train.revision(exported) != record["revision"]
    finally:
        one.write_bytes(original)


@pytest.mark.parametrize("wrong", ["unet", "unet=", "unet=0", "unet=-3", "unet=many", "gan=5", "=5"])
def test_steps_that_cannot_be_are_named(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.parse(["--steps", wrong])
    assert ended.value.code == 2
    assert f"--steps {wrong}: expected MODEL=N with MODEL one of vae, clip, blip, unet and N >= 1" in capsys.readouterr().err


def test_steps_change_one_recipe_and_not_the_default() -> None:
    options, recipes = train.parse(["--steps", "unet=7", "--steps", "vae=3", "--only", "unet"])
    assert {name: recipe.steps for name, recipe in recipes.items()} == {
        "vae": 3,
        "clip": RECIPES["clip"].steps,
        "blip": RECIPES["blip"].steps,
        "unet": 7,
    }
    assert recipes["unet"].learning_rate == RECIPES["unet"].learning_rate
    assert RECIPES["unet"].steps > 7
    assert options.only == ["unet"]


def test_chance_is_a_function_of_its_key() -> None:
    (a, x), (b, y), (c, z) = (train.seeded("vae", step) for step in (1, 1, 2))
    first = a.random()
    assert (b.random(), c.random() == first) == (first, False)
    drawn = torch.rand(3, generator=x)
    assert torch.equal(drawn, torch.rand(3, generator=y))
    assert not torch.equal(drawn, torch.rand(3, generator=z))


def test_no_held_out_scene_is_ever_trained_on() -> None:
    held_out = set(draw.held_out_scenes())
    for step in range(50):
        rng, _ = train.seeded("blip", step)
        pictures, scenes = train.drawings(4, rng)
        assert not held_out & set(scenes)
    assert pictures.shape == (4, 3, 128, 128)
    assert -1 <= float(pictures.min()) < float(pictures.max()) <= 1
    _, distinct = train.drawings(100, rng, distinct=True)
    assert len(set(distinct)) == 100


def test_weathering_touches_its_share_and_stays_in_range() -> None:
    pictures = torch.zeros(200, 3, 8, 8)
    found = train.weathered(pictures, torch.Generator().manual_seed(0), share=0.7)
    touched = (found != 0).flatten(1).any(1).float().mean()
    assert 0.6 < touched < 0.8
    assert float(found.abs().max()) <= 1


def test_the_rate_warms_up_holds_and_falls_to_zero() -> None:
    recipe = Recipe(steps=1000, plain_steps=1000, batch=1, learning_rate=2.0)
    rates = [train.rate(step, recipe) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[99] == rates[799] == 2.0
    assert rates[900] == pytest.approx(1.0)
    assert rates[1000] == 0
    assert np.all(np.diff(rates[:100]) > 0)
    assert np.all(np.diff(rates[800:]) < 0)


def test_the_scaling_factor_makes_latents_of_unit_deviation() -> None:
    source = torch.Generator().manual_seed(0)
    mean, std = 3 + 4 * torch.randn((500, 4, 4, 4), generator=source), torch.full((500, 4, 4, 4), 3.0)
    assert train.latent_scaling_factor(mean, std) == pytest.approx(0.2, rel=0.02)
