"""Edits with masks by OpenAI's real clients, over a real connection to the real generator."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image, ImageDraw

from momalisa import checkpoint
from momalisa.config import Diffusion, Settings
from momalisa.storage import Store
from serve import again
from serve.api import create_app
from serve.png import read
from serve.replica import Generator
from tests.serve.conftest import LIMITS, listening
from tests.serve.test_edits import mask_of

CLIENT: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 60}
LIMITED = LIMITS.model_copy(update={"size_px": 128})
MASK = ("mask.png", mask_of((128, 128)), "image/png")  # its right half is painted again


@pytest.fixture(scope="module")
def address(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the miniature, which has learnt to see: random weights keep no picture as it is."""
    diffusion, weights = Diffusion(model="miniature://diffusion"), tmp_path_factory.mktemp("weights")
    store = Store(str(tmp_path_factory.mktemp("root")))
    checkpoint.save_weights(checkpoint.load_base_unet(diffusion), weights)
    entry = checkpoint.Checkpoint("checkpoints/base/0", "base", 0, diffusion.model_dump(), files={})
    checkpoint.write(store, entry, weights)
    store.write_json(checkpoint.BEST, {"checkpoint": entry.path})
    generator = Generator(settings.model_copy(update={"root": store.root, "serve": LIMITED}))
    with listening(create_app(generator, LIMITED)) as made:
        yield f"{made}/v1"
    generator.close()


def photograph() -> tuple[str, bytes, str]:
    picture, sink = Image.new("RGB", (128, 128), "teal"), io.BytesIO()
    ImageDraw.Draw(picture).ellipse((16, 16, 112, 112), "orange")
    picture.save(sink, "PNG")
    return "photograph.png", sink.getvalue(), "image/png"


def files_of(answer: Any) -> list[bytes]:
    return [base64.b64decode(entry.b64_json) for entry in answer.data]


def levels(file: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(np.int16)


def test_what_the_mask_keeps_stays_and_the_rest_is_painted_again(address: str) -> None:
    asked = {"seed": 3, "steps": 8, "guidance_scale": 2.5, "strength": 1.0}  # a form's fields: texts
    with openai.OpenAI(base_url=address, **CLIENT) as client:
        edits = [
            files_of(client.images.edit(image=image, mask=MASK, prompt="a boat", n=2, size="128x128", extra_body=asked))
            for image in (photograph(), [photograph()])  # sent as `image`, and as `image[]`
        ]
    assert edits[0] == edits[1]
    said = read(edits[0][1])
    assert (said["seed"], said["steps"], said["guidance_scale"], said["strength"]) == ("4", "8", "2.5", "1.0")
    for file in edits[0]:
        changed = np.abs(levels(file) - levels(photograph()[1])).mean(axis=(0, 2))  # of each column: 16 and 80 levels
        assert changed[72:].mean() > 3 * changed[:56].mean(), changed


async def test_an_edit_is_painted_again_bit_by_bit_in_a_crowd(address: str) -> None:
    settings = {"seed": 0, "steps": 6, "strength": 0.6, "sampler": "unipc", "negative_prompt": "red", "guidance_scale": 2.5}
    sent: dict[str, Any] = {"image": photograph(), "mask": MASK}
    async with openai.AsyncOpenAI(base_url=address, **CLIENT) as client:
        asked = client.images.edit(prompt="a boat", **sent, extra_body={**settings, "reproducible": True})
        [file] = files_of(await asked)
        fields = again.fields(file, photograph()[1], MASK[1])
        crowd = [client.images.generate(prompt="a crowd", n=3, extra_body={"steps": 9, "seed": n}) for n in range(3)]
        repeated = client.images.edit(prompt=fields.pop("prompt"), **sent, extra_body=fields)
        answer, *_ = await asyncio.gather(repeated, *crowd)
    assert files_of(answer) == [file]
