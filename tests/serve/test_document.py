"""The OpenAPI document is true: whatever it allows, and whatever it does not, is answered as it says."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.specs.openapi import checks

from momalisa.config import Settings
from serve import keys
from serve.api import create_app
from serve.replica import Generator
from serve.task import Ballot, Completed, Event, GenerationTask, Picture, Progress, State, Waiting
from serve.wire import MAX_STEPS
from tests.serve.conftest import LIMITS
from tests.serve.test_api import FakeBackend
from tests.serve.test_edits import mask_of, png

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
LIMITED = LIMITS.model_copy(update={"tiers": ("draft",)})
UPLOADS = [mask_of(), png(), png((80, 48), "blue"), png()[:60]]
schemathesis.openapi.format("binary", st.sampled_from(UPLOADS) | st.binary())  # its own samples are too small to be edited


class Whole(FakeBackend):
    """Says everything that a generator can say."""

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        sink = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(sink, "PNG")
        yield Waiting(1, 0.5)
        for index in range(len(task.seeds)):
            yield Progress(index, 1, 2, sink.getvalue())
            yield Picture(index, sink.getvalue(), f"fake-{index}")
        yield Completed("fake-1", ({"rows": 1},) if task.trace else ())

    async def state(self) -> State:
        return State("fake-0", challenger="fake-1")

    async def vote(self, ballot: Ballot) -> None:
        pass


SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", create_app(Whole(), LIMITED))


@SCHEMA.parametrize()
@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_the_server_does_what_its_document_says(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)


@pytest.fixture(scope="module")
def real(settings: Settings) -> Iterator[Any]:
    """Over a generator of its own: the jobs that are begun here are not in the way of other tests."""
    generator = Generator(settings)
    yield create_app(generator, LIMITED)
    generator.close()


@SCHEMA.include(method="POST", path_regex="images|jobs").parametrize()
@hypothesis_settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_so_does_the_real_generator(case: Any, real: Any) -> None:
    if isinstance(case.body, dict) and case.body.get("steps") in range(1, MAX_STEPS + 1):
        case.body |= {"steps": 2}  # soon painted, and not refused for what no schema says
        case.body = {name: value for name, value in case.body.items() if name not in ("adapter", "deadline_s", "strength")}
    case.call_and_validate(checks=CHECKS, app=real)


@pytest.fixture
def closed(tmp_path: Path) -> Any:
    path = tmp_path / "keys.json"
    keys.main(["add", str(path), "--name", "x"])
    return create_app(Whole(), LIMITS.model_copy(update={"keys": str(path), "cors_origins": ("https://museum.example",)}))


def test_a_closed_server_says_so_on_every_route_but_health(closed: Any) -> None:
    async def answers() -> dict[str, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(closed), base_url="http://museum") as client:
            document = (await client.get("/openapi.json")).json()
            assert document["security"] == [{"key": []}]
            routes = [(path.replace("{id}", "x"), method) for path, item in document["paths"].items() for method in item]
            return {f"{method} {path}": (await client.request(method, path)).status_code for path, method in routes}

    found = asyncio.run(answers())
    assert found.pop("get /healthz") == 200
    assert set(found.values()) == {401}
    assert len(found) == 11


def test_pages_of_listed_origins_may_call_and_others_may_not(closed: Any) -> None:
    async def allowed(origin: str) -> str | None:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(closed), base_url="http://museum") as client:
            answer = await client.options("/v1/images/generations", headers=headers)
        return answer.headers.get("Access-Control-Allow-Origin")

    assert asyncio.run(allowed("https://museum.example")) == "https://museum.example"
    assert asyncio.run(allowed("https://elsewhere.example")) is None


def test_a_prompt_as_a_pictures_file_says_it_is_within_the_document() -> None:
    async def answers(prompt: str) -> tuple[int, int]:
        transport = httpx.ASGITransport(create_app(Whole(), LIMITED))
        async with httpx.AsyncClient(transport=transport, base_url="http://museum") as client:
            body = (await client.get("/openapi.json")).json()["paths"]["/v1/images/generations"]["post"]["requestBody"]
            schema = body["content"]["application/json"]["schema"]
            painted = await client.post("/v1/images/generations", json={"prompt": prompt})
            return painted.status_code, schema["properties"]["prompt"]["maxLength"]

    longest = LIMITED.prompt_prefix + "x" * LIMITED.max_prompt_chars
    assert asyncio.run(answers(longest)) == (200, len(longest))
    assert asyncio.run(answers(longest + "x"))[0] == 400


def test_samplers_are_the_engines() -> None:
    from momalisa.engine import SAMPLERS
    from serve import wire

    assert wire.SAMPLERS == SAMPLERS


def test_tiers_are_the_engines() -> None:
    from typing import get_args

    from momalisa.engine.tiers import TIERS
    from serve.task import Tier

    assert get_args(Tier) == tuple(TIERS)
