"""The HTTP layer over a real generator with random weights: right requests, wrong ones, and anything at all."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from momalisa import config
from serve.api import HEADERS, create_app
from serve.replica import Generator
from serve.task import Completed, Event, Failed, GenerationTask, Outcome, Picture, Rejected, State, Unavailable

PATH = "/v1/images/generations"
LIMITS = config.Serve(size_px=64, steps=1, guidance_scale=1.0, max_pictures_per_request=3, max_prompt_chars=200)


def picture_of(entry: dict[str, Any]) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
    image.load()
    return image


class FakeBackend:
    """Answers with what it was given, and remembers what it was asked."""

    def __init__(self, outcome: Outcome | None = None) -> None:
        self.outcome = outcome
        self.asked: list[GenerationTask] = []

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        self.asked.append(task)
        if self.outcome is None:
            for index in range(len(task.seeds)):
                yield Picture(index, b"png", "fake-1")
        yield self.outcome or Completed("fake-1")

    async def state(self) -> State:
        if self.outcome is None:
            return State("fake-1")
        raise Unavailable("no generator answered within 5 s; it may be starting")

    async def adapters(self) -> list[str]:
        return []

    async def metrics(self) -> list[tuple[str, str]]:
        return []


def client_of(backend: FakeBackend) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(backend, LIMITS)), base_url="http://museum")


async def test_a_picture_and_how_it_was_made(client: httpx.AsyncClient) -> None:
    asked = {"prompt": " ein Café \0 ☕", "seed": 5, "steps": 2, "guidance_scale": 2.5, "negative_prompt": "red", "user": "me"}
    answer = (await client.post(PATH, json=asked)).json()
    assert answer["model"] == "tiny-64"
    entry = answer["data"][0]
    assert entry["revised_prompt"] == "A MOMA artwork of: ein Café \0 ☕"
    image = picture_of(entry)
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
    assert image.info == {
        "prompt": entry["revised_prompt"],
        "negative_prompt": "red",
        "seed": "5",
        "steps": "2",
        "guidance_scale": "2.5",
        "sampler": "dpmpp_2m",
        "size_px": "64",
        "checkpoint": "tiny-64",
    }


async def test_n_pictures_take_following_seeds_and_a_seed_repeats(client: httpx.AsyncClient) -> None:
    three = (await client.post(PATH, json={"prompt": "a boat", "n": 3, "seed": 10})).json()["data"]
    assert [entry["seed"] for entry in three] == [10, 11, 12]
    second = (await client.post(PATH, json={"prompt": "a boat", "seed": 11})).json()["data"][0]
    pixels = [picture_of(entry).tobytes() for entry in (*three, second)]
    assert max(abs(a - b) for a, b in zip(pixels[1], pixels[3], strict=True)) <= 1
    assert len(set(pixels[:3])) == 3


async def test_without_a_seed_every_picture_is_new(client: httpx.AsyncClient) -> None:
    seeds = {(await client.post(PATH, json={"prompt": "a boat"})).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(("size", "side"), [("auto", 64), ("64x64", 64), ("48x48", 48), ("32x32", 32), (None, 64)])
async def test_sizes(client: httpx.AsyncClient, size: str | None, side: int) -> None:
    answer = (await client.post(PATH, json={"prompt": "a boat", "size": size})).json()
    assert picture_of(answer["data"][0]).size == (side, side)


async def test_concurrent_visitors_share_batches(client: httpx.AsyncClient) -> None:
    prompts = [{"prompt": "a boat", "seed": seed, "steps": 1 + seed % 2} for seed in range(4)]
    answers = await asyncio.gather(*(client.post(PATH, json=prompt) for prompt in prompts))
    assert [answer.json()["data"][0]["seed"] for answer in answers] == [0, 1, 2, 3]


async def test_a_url_is_a_data_url() -> None:
    async with client_of(FakeBackend()) as client:
        entry = (await client.post(PATH, json={"prompt": "a boat", "response_format": "url"})).json()["data"][0]
    assert entry["url"] == "data:image/png;base64," + base64.b64encode(b"png").decode()
    assert "b64_json" not in entry


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ("a coffee", "A MOMA artwork of: a coffee"),
        ("  a coffee\n", "A MOMA artwork of: a coffee"),
        ("A MOMA artwork of: a coffee", "A MOMA artwork of: a coffee"),
        ("a moma artwork of: a coffee", "a moma artwork of: a coffee"),
    ],
)
async def test_the_prefix_is_there_once(typed: str, asked: str) -> None:
    backend = FakeBackend()
    async with client_of(backend) as client:
        await client.post(PATH, json={"prompt": typed})
    assert backend.asked[0].prompt == asked


async def test_defaults_and_null_are_the_same() -> None:
    backend = FakeBackend()
    nulls = dict.fromkeys(("n", "size", "steps", "guidance_scale", "negative_prompt", "response_format", "model"))
    async with client_of(backend) as client:
        for body in ({"prompt": "x", "seed": 0}, {"prompt": "x", "seed": 0, **nulls}):
            assert (await client.post(PATH, json=body)).status_code == 200
    assert backend.asked[0] == backend.asked[1] == GenerationTask("A MOMA artwork of: x", (0,), 1, 1.0, 64, key="127.0.0.1")


WRONG_FIELDS = [
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": " \n\t\u3000"}, "prompt", "prompt is empty"),
    ({"prompt": "x" * 100_000}, "prompt", "prompt has 100000 characters: at most 200 are allowed"),
    ({"prompt": 5}, "prompt", "got 5"),
    ({"prompt": ["a boat"]}, "prompt", 'got ["a boat"]'),
    ({"prompt": None}, "prompt", "got null"),
    ({}, "prompt", "prompt is missing"),
    ({"prompt": "\ud800"}, "prompt", 'got "\\ud800"'),
    ({"prompt": "x", "negative_prompt": "\udfff"}, "negative_prompt", "must be text"),
    ({"prompt": "x", "negative_prompt": "y" * 201}, "negative_prompt", "negative_prompt has 201 characters"),
    ({"prompt": "x", "n": 0}, "n", "n must be a whole number from 1 to 3, and 1 for a stream; got 0"),
    ({"prompt": "x", "n": 4}, "n", "n must be a whole number from 1 to 3, and 1 for a stream; got 4"),
    ({"prompt": "x", "n": True}, "n", "got true"),
    ({"prompt": "x", "n": 1.0}, "n", "got 1.0"),
    ({"prompt": "x", "size": "1024x1024"}, "size", "size must be one of auto, 64x64, 48x48, 32x32"),
    ({"prompt": "x", "size": 64}, "size", "got 64"),
    ({"prompt": "x", "steps": 0}, "steps", "from 1 to 100; got 0"),
    ({"prompt": "x", "steps": 101}, "steps", "from 1 to 100; got 101"),
    ({"prompt": "x", "steps": "20"}, "steps", 'got "20"'),
    ({"prompt": "x", "guidance_scale": 0.99}, "guidance_scale", "a number from 1 to 30; got 0.99"),
    ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale", "got NaN"),
    ({"prompt": "x", "guidance_scale": 1e999}, "guidance_scale", "got Infinity"),
    ({"prompt": "x", "seed": -1}, "seed", "got -1"),
    ({"prompt": "x", "seed": 2**53}, "seed", "got 9007199254740992"),
    ({"prompt": "x", "seed": 2**53 - 2, "n": 3}, "seed", "the last picture's too; got 9007199254740990"),
    ({"prompt": "A MOMA artwork of: " + "y" * 201}, "prompt", "prompt has 201 characters"),
    ({"prompt": "x", "model": 1}, "model", "model must be text"),
    ({"prompt": "x", "stream": 1}, "stream", "stream must be true or false"),
    ({"prompt": "x", "stream": True, "n": 2}, "n", "and 1 for a stream"),
    ({"prompt": "x", "partial_images": 4}, "partial_images", "from 0 to 3; got 4"),
    ({"prompt": "x", "sampler": "plms"}, "sampler", "sampler must be one of ddim, euler"),
    ({"prompt": "x", "size": "60x60"}, "size", "size must be one of auto, 64x64, 48x48, 32x32"),
    ({"prompt": "x", "adapter": "../secrets/1"}, "adapter", "adapter must be a LoRA's checkpoint"),
    ({"prompt": "x", "deadline_s": 0}, "deadline_s", "above 0"),
    ({"prompt": "x", "output_format": "webp"}, "output_format", "output_format must be png"),
    ({"prompt": "x", "response_format": "jpeg"}, "response_format", "b64_json or url"),
]


@pytest.mark.parametrize(("body", "param", "message"), WRONG_FIELDS)
async def test_wrong_fields_are_named(body: dict[str, Any], param: str, message: str) -> None:
    async with client_of(FakeBackend()) as client:
        answer = await client.post(PATH, content=json.dumps(body))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}", b"prompt=x"]
)
async def test_bodies_that_are_no_json_object(body: bytes) -> None:
    async with client_of(FakeBackend()) as client:
        answer = await client.post(PATH, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


async def test_a_long_body_is_refused() -> None:
    async with client_of(FakeBackend()) as client:
        answer = await client.post(PATH, content=b'{"prompt": "' + b"x" * 1_000_000 + b'"}')
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_full_line_says_when_to_come_back() -> None:
    async with client_of(FakeBackend(Rejected(7))) as client:
        answer = await client.post(PATH, json={"prompt": "x"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
    assert answer.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize(("retry", "status"), [(True, 503), (False, 500)])
async def test_failures_of_the_generator(retry: bool, status: int) -> None:
    async with client_of(FakeBackend(Failed("the generator was lost", retry))) as client:
        answer = await client.post(PATH, json={"prompt": "x"})
        assert (await client.get("/healthz")).status_code == 503
        assert (await client.get("/v1/models")).headers["Retry-After"] == "5"
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, "the generator was lost")


async def test_what_is_wrong_is_told_without_saying_where() -> None:
    backend = FakeBackend()

    async def state() -> State:
        return State("fake-1", problem="checkpoints/new/2 cannot be served: gs://secret/checkpoints/new/2 has sha256 1234...")

    backend.state = state  # type: ignore[method-assign]
    async with client_of(backend) as client:
        answer = await client.get("/healthz")
    assert answer.json()["problem"] == "checkpoints/new/2 cannot be served; the log says why"
    assert "secret" not in answer.text


class Crashing(FakeBackend):
    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        raise ZeroDivisionError("not a number of cups")
        yield Completed("x")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_nobody_expected_is_a_500_with_every_header_and_counted_as_one(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    app = create_app(Crashing(), LIMITS.model_copy(update={"cors_origins": ("https://museum.example",)}))
    headers = {"X-Request-ID": "visit-9", "Origin": "https://museum.example"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://museum") as client:
        with caplog.at_level(logging.INFO):
            answer = await client.post(PATH, json={"prompt": "x", "stream": stream}, headers=headers)
        counted = (await client.get("/metrics")).text
    assert answer.status_code == 500
    assert "its log says why, at request visit-9" in answer.json()["error"]["message"]
    assert answer.headers["X-Request-ID"] == "visit-9"
    assert answer.headers["Access-Control-Allow-Origin"] == "https://museum.example"
    assert all(answer.headers[name] == value for name, value in HEADERS.items())
    assert f'momalisa_http_requests_total{{route="{PATH}",status="500"}} 1.0' in counted
    failed, line = [record for record in caplog.records if record.name in ("serve.failures", "serve.requests")][:2]
    assert failed.getMessage() == "request visit-9 failed"
    assert "not a number of cups" in caplog.text
    assert json.loads(line.getMessage())["status"] == 500


async def test_a_task_knows_its_request() -> None:
    backend = FakeBackend()
    async with client_of(backend) as client:
        given = await client.post(PATH, json={"prompt": "x"}, headers={"X-Request-ID": "visit-7"})
        made = await client.post(PATH, json={"prompt": "x"})
    assert [task.request_id for task in backend.asked] == ["visit-7", made.headers["X-Request-ID"]]
    assert given.headers["X-Request-ID"] == "visit-7"


async def test_health_and_models(client: httpx.AsyncClient) -> None:
    shown = {"status": "ok", "checkpoint": "tiny-64", "trial": None, "problem": None, "challenger": None}
    assert (await client.get("/healthz")).json() == shown | {"picture_check": "none: the base model has no safety checker"}
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["tiny-64"]


@pytest.mark.parametrize(("path", "kind"), [("/", "text/html"), ("/style.css", "text/css"), ("/page.js", "text/javascript")])
async def test_the_page_and_its_headers(path: str, kind: str) -> None:
    async with client_of(FakeBackend()) as client:
        answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith(kind)
    assert all(answer.headers[name] == value for name, value in HEADERS.items())
    assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", PATH, 405), ("GET", "/nothing", 404), ("GET", "/../pyproject.toml", 404)]
)
async def test_other_paths_answer_in_the_same_shape(method: str, path: str, status: int) -> None:
    async with client_of(FakeBackend()) as client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    assert "POST /v1/images/generations" in answer.json()["error"]["message"]


TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # unpaired surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("prompt", "n", "size", "seed", "steps", "guidance_scale", "negative_prompt", "response_format", "model", "quality")
NEARLY = st.fixed_dictionaries({"prompt": TEXT}, optional=dict.fromkeys(FIELDS[1:], JSON))
BODIES = st.one_of(
    st.binary(), (JSON | NEARLY | st.dictionaries(st.sampled_from(FIELDS), JSON)).map(lambda v: json.dumps(v).encode())
)


@given(body=BODIES)
@hypothesis_settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_body_makes_the_server_fail(body: bytes) -> None:
    async def post() -> httpx.Response:
        async with client_of(FakeBackend()) as client:
            return await client.post(PATH, content=body)

    answer = asyncio.run(post())
    assert answer.status_code in {200, 400}
    assert ("data" if answer.status_code == 200 else "error") in answer.json()


@given(prompt=st.text(min_size=1, max_size=60).filter(str.strip))
@hypothesis_settings(max_examples=15, deadline=None)
def test_any_text_is_painted(generator: Generator, prompt: str) -> None:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(generator, LIMITS))
        async with httpx.AsyncClient(transport=transport, base_url="http://museum") as client:
            return await client.post(PATH, json={"prompt": prompt, "seed": 1})

    entry = asyncio.run(post()).json()["data"][0]
    assert picture_of(entry).info["prompt"] == entry["revised_prompt"]


async def test_an_adapter_that_is_not_there_is_the_callers_error(client: httpx.AsyncClient) -> None:
    for name in ("nobody/64", "tiny/64"):  # nothing, and a whole model
        answer = await client.post(PATH, json={"prompt": "x", "adapter": name})
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, f"there is no adapter {name}; there is none")


async def test_a_pictures_own_file_is_enough_to_paint_it_again(client: httpx.AsyncClient, tiny_base: Path) -> None:
    from momalisa.config import Diffusion
    from momalisa.engine import Engine, from_parameters
    from serve.png import read

    asked = {"prompt": "a boat", "seed": 7, "steps": 5, "guidance_scale": 3, "negative_prompt": "red", "sampler": "unipc"}
    data = base64.b64decode((await client.post(PATH, json=asked)).json()["data"][0]["b64_json"])
    again = Engine.load(Diffusion(model=str(tiny_base))).generate([from_parameters(read(data))])[0]
    painted = Image.open(io.BytesIO(data)).tobytes()
    assert max(abs(a - b) for a, b in zip(painted, again.tobytes(), strict=True)) <= 1


async def test_a_speed_tier_where_the_settings_allow_it(generator: Generator, tiny_base: Path) -> None:
    from momalisa.config import Diffusion
    from momalisa.engine import Engine, from_parameters
    from serve.png import read

    asked = {"prompt": "a boat", "seed": 7, "steps": 10, "guidance_scale": 3}
    limits = LIMITS.model_copy(update={"tiers": ("draft",)})
    transport = httpx.ASGITransport(create_app(generator, limits))
    async with httpx.AsyncClient(transport=transport, base_url="http://museum") as client:
        for tier in ("interval", "fast", 1):
            answer = await client.post(PATH, json={**asked, "tier": tier})
            assert answer.status_code == 400
            assert "tier must be one of full, draft" in answer.json()["error"]["message"]
        full, draft = [
            (await client.post(f"{PATH}?debug=trace", json={**asked, "tier": tier})).json() for tier in (None, "draft")
        ]
    assert (len(full["trace"]), len(draft["trace"])) == (10, 6)
    data = base64.b64decode(draft["data"][0]["b64_json"])
    said = read(data)
    assert (said["tier"], said["steps"], said["guidance_interval"]) == ("draft", "6", "0.28 5.42")
    assert "tier" not in read(base64.b64decode(full["data"][0]["b64_json"]))
    again = Engine.load(Diffusion(model=str(tiny_base))).generate([from_parameters(said)])[0]
    painted = Image.open(io.BytesIO(data)).tobytes()
    assert max(abs(a - b) for a, b in zip(painted, again.tobytes(), strict=True)) <= 1
