"""A picture's own file is enough to ask for it again; an edit's, with the pictures that went in and no others."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from momalisa.engine.request import pixel_hash
from serve import again, uploads, wire
from serve.api import create_app
from serve.png import encode, read
from serve.replica import Generator
from tests.serve.conftest import LIMITS
from tests.serve.test_edits import mask_of, png

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PHOTOGRAPH, MASK = png((200, 100), "teal"), mask_of((200, 100))  # neither is the square that the engine gets


@pytest.fixture
async def visitor(generator: Generator) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(generator, LIMITS.model_copy(update={"tiers": ("draft",)})))
    async with httpx.AsyncClient(transport=transport, base_url="http://museum") as made:
        yield made


def files_of(answer: httpx.Response) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]


async def edited(visitor: httpx.AsyncClient, mask: bytes | None, **fields: Any) -> bytes:
    files = {"image": PHOTOGRAPH} | ({"mask": mask} if mask else {})
    return files_of(await visitor.post(EDITS, data={name: str(value) for name, value in fields.items()}, files=files))[0]


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 0},
        {"prompt": "x" * LIMITS.max_prompt_chars},  # with its prefix, longer than visitors may type
        {"negative_prompt": "red", "guidance_scale": 3.5, "sampler": "unipc", "size": "48x48"},
        {"tier": "draft", "steps": 10},
        {"seed": wire.MAX_SEED - 1, "n": 2},
    ],
)
async def test_what_a_file_says_asks_for_the_same_file(visitor: httpx.AsyncClient, more: dict[str, Any]) -> None:
    asked = {"prompt": "a boat", "seed": 7, "steps": 4, "reproducible": True, **more}
    for file in files_of(await visitor.post(GENERATIONS, json=asked)):
        assert files_of(await visitor.post(GENERATIONS, json=again.fields(file))) == [file]


@pytest.mark.parametrize("mask", [None, MASK])
async def test_an_edit_is_painted_again_from_its_file_and_what_was_sent(visitor: httpx.AsyncClient, mask: bytes | None) -> None:
    asked = {"prompt": "a boat", "seed": 0, "steps": 5, "strength": 0.7, "sampler": "euler", "reproducible": True}
    file = await edited(visitor, mask, **asked)
    fields = again.fields(file, PHOTOGRAPH, mask)
    assert fields["strength"] == 0.7
    assert await edited(visitor, mask, **fields) == file


async def test_only_the_pictures_that_went_in_are_taken(visitor: httpx.AsyncClient) -> None:
    file = await edited(visitor, MASK, prompt="a boat", steps=2)
    square, hole = uploads.prepare(uploads.Form({}, PHOTOGRAPH, MASK), 64, LIMITS)
    assert hole is not None
    wanted = {"image": pixel_hash(Image.open(io.BytesIO(square))), "mask": pixel_hash(Image.open(io.BytesIO(hole)))}
    for sent, name, given in (
        ((None, None), "image", "none"),
        ((png((200, 100), "red"), MASK), "image", "[0-9a-f]{64}"),
        ((PHOTOGRAPH, None), "mask", "none"),
        ((PHOTOGRAPH, mask_of((200, 100), upper=True)), "mask", "[0-9a-f]{64}"),
    ):
        with pytest.raises(ValueError, match=f"made with {name} {wanted[name]}, and {given} was given"):
            again.fields(file, *sent)
    with pytest.raises(ValueError, match="the mask is 8x8, the picture 200x100"):
        again.fields(file, PHOTOGRAPH, mask_of((8, 8)))
    plain = files_of(await visitor.post(GENERATIONS, json={"prompt": "a boat"}))[0]
    with pytest.raises(ValueError, match="made with image none"):
        again.fields(plain, PHOTOGRAPH)


async def test_the_command(visitor: httpx.AsyncClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, photograph, mask = (tmp_path / name for name in ("edited.png", "photograph.png", "mask.png"))
    file.write_bytes(await edited(visitor, MASK, prompt="a boat", steps=2))
    photograph.write_bytes(PHOTOGRAPH)
    mask.write_bytes(MASK)
    assert again.main([str(file), "--image", str(photograph), "--mask", str(mask)]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "A MOMA artwork of: a boat"
    assert again.main([str(file)]) == 2
    assert f"made with image {read(file.read_bytes())['image']}, and none was given" in capsys.readouterr().err
    for other in (photograph, tmp_path / "nothing.png", Path(__file__)):
        assert again.main([str(other)]) == 2
        assert capsys.readouterr().err.startswith(f"{other}: ")


def test_a_tier_that_is_none_is_said() -> None:
    said = {"prompt": "x", "seed": "1", "steps": "3", "guidance_scale": "2.0", "size_px": "64", "sampler": "ddim", "tier": "fast"}
    with pytest.raises(ValueError, match="no request for tier='fast' does 3 steps"):
        again.fields(encode(Image.new("RGB", (64, 64)), said))
