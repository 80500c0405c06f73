"""What is not painted and not shown, and how it is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from momalisa.config import Diffusion
from serve import checks, finishing
from serve.api import create_app
from serve.task import Completed, Event, GenerationTask, Picture
from tests.serve.conftest import LIMITS
from tests.serve.double import loaded
from tests.serve.test_api import FakeBackend


def no_sevens(prompt: str) -> str | None:
    return "no sevens here" if "7" in prompt else None


def withhold(picture: Image.Image) -> str | None:
    return "this one is withheld"


@pytest.mark.parametrize(
    "prompt", ["a Weapon", "WEAPONS of war", "nu\u0308de", "a  well-known   name", "ｗｅａｐｏｎ", "wea\u200bp\u00ado\u2060n"]
)
def test_forbidden_words_are_found_however_they_are_written(prompt: str) -> None:
    check = checks.forbidden(["weapon", "weapons", "nüde", "well known name"])
    assert check(prompt)


@pytest.mark.parametrize("prompt", ["weaponry", "a boat", "well, a known name", ""])
def test_other_words_are_not(prompt: str) -> None:
    assert checks.forbidden(["weapon", "well known name"])(prompt) is None


def test_an_empty_list_forbids_nothing() -> None:
    assert checks.forbidden([])("anything") is None


async def test_a_forbidden_prompt_is_content_filtered(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("# not here\nweapon\n")
    limits = LIMITS.model_copy(update={"forbidden_words": str(words), "prompt_check": f"{__name__}:no_sevens"})
    backend = FakeBackend()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(backend, limits)), base_url="http://m") as client:
        for body in ({"prompt": "a weapon"}, {"prompt": "x", "negative_prompt": "weapon"}, {"prompt": "7 swans"}):
            answer = await client.post("/v1/images/generations", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filtered")
            assert "weapon" not in answer.text
        assert (await client.post("/v1/images/generations", json={"prompt": "a boat"})).status_code == 200
    assert len(backend.asked) == 1


class Withholding(FakeBackend):
    def __init__(self, withheld: set[int]) -> None:
        super().__init__()
        self.withheld = withheld

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        for index in range(len(task.seeds)):
            yield Picture(index, None, "x", "not shown") if index in self.withheld else Picture(index, b"png", "x")
        yield Completed("x")


async def test_a_withheld_picture_is_said_and_never_black() -> None:
    app = create_app(Withholding({1}), LIMITS)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://m") as client:
        data = (await client.post("/v1/images/generations", json={"prompt": "x", "n": 2})).json()["data"]
        assert "b64_json" in data[0]
        assert (data[1]["finish_reason"], data[1]["filtered"]) == ("content_filtered", "not shown")
        assert "b64_json" not in data[1]
    app = create_app(Withholding({0}), LIMITS)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://m") as client:
        alone = await client.post("/v1/images/generations", json={"prompt": "x"})
        assert (alone.status_code, alone.json()["error"]["code"]) == (400, "content_filtered")
        stream = await client.post("/v1/images/generations", json={"prompt": "x", "stream": True})
        assert '"content_filtered"' in stream.text


def test_a_finished_picture_is_checked() -> None:
    checkpoint = loaded()
    checkpoint.check = checks.imported(f"{__name__}:withhold")
    picture = Image.effect_noise((16, 16), 50).convert("RGB")
    made = finishing.picture(GenerationTask("x", (0,), 1, 1.0, 16), 0, checkpoint, picture)
    assert made == Picture(0, None, "old-1", "this one is withheld")


def test_checks_that_are_not_there_stop_the_server(tmp_path: Path) -> None:
    for name in ("nowhere:check", "serve.checks:nothing", "serve", ""):
        with pytest.raises(ValueError, match="is no check"):
            checks.imported(name)
    with pytest.raises(ValueError, match="forbidden_words"):
        checks.prompt_check(LIMITS.model_copy(update={"forbidden_words": str(tmp_path / "none")}))


def name_a_checker(base: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (base / "model_index.json").write_text(json.dumps(index))


def test_a_base_without_an_index_is_not_taken_for_one_without_a_checker(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"model_index\.json"):
        checks.safety_checker(Diffusion(model=str(base)), "cpu")


@pytest.mark.parametrize(
    ("setting", "there", "said"),
    [("auto", True, "safety_checker"), ("auto", False, "none: the base"), ("off", False, "off"), ("a:b", True, "a:b")],
)
def test_which_check_is_at_work_is_said(setting: str, there: bool, said: str) -> None:
    limits = LIMITS.model_copy(update={"picture_check": setting})
    assert checks.said(limits, withhold if there else None).startswith(said)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stable_diffusions_own_checker_is_used_where_the_model_has_one(tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    assert checks.safety_checker(Diffusion(model=str(tiny_base)), "cpu") is None
    base = shutil.copytree(tiny_base, tmp_path / "base")
    name_a_checker(base)
    with pytest.raises(ValueError, match=r"\(safety_checker\).*names a safety checker; serve.picture_check=off does without"):
        checks.safety_checker(Diffusion(model=str(base)), "cpu")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    config = CLIPConfig(vision_config={**size, "image_size": 32, "patch_size": 16}, text_config=size, projection_dim=8)
    judge = StableDiffusionSafetyChecker(config)
    for found, threshold in ((False, 2.0), (True, -2.0)):  # a cosine is never above 2, always above -2
        with torch.no_grad():
            judge.concept_embeds_weights.fill_(threshold)
            judge.special_care_embeds_weights.fill_(2.0)
            judge.concept_embeds.fill_(1.0)
            judge.special_care_embeds.fill_(1.0)
        judge.save_pretrained(base / "safety_checker")
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
            base / "feature_extractor"
        )
        check = checks.safety_checker(Diffusion(model=str(base)), "cpu")
        assert check is not None
        assert bool(check(Image.effect_noise((64, 64), 50).convert("RGB"))) is found
