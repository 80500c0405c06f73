"""A real local Ray Serve application, asked by the real openai client."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from PIL import Image

pytestmark = pytest.mark.integration

PORT = 8127
SERVER = f"http://127.0.0.1:{PORT}"
CONFIG = Path(__file__).parents[2] / "serve" / "config.yaml"


@pytest.fixture(scope="module")
def server(ray_cluster: Any, promoted_root: Path) -> Iterator[str]:
    from ray import serve as ray_serve

    from serve.app import ServeArgs, build

    rows = ["--serve.max_rows=16", "--serve.max_waiting_rows=16", "--serve.max_waiting_rows_per_key=16"]
    overrides = [f"--root={promoted_root}", "--serve.size_px=64", "--serve.steps=2", *rows]
    ray_serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    ray_serve.run(build(ServeArgs(overrides=overrides)), name="test")
    yield SERVER
    ray_serve.shutdown()


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def picture_of(encoded: str | None) -> Image.Image:
    assert encoded is not None
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    image.load()
    return image


def test_the_openai_client_gets_pictures(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a coffee", n=2, size="64x64", response_format="b64_json", extra_body={"seed": 3})
    assert answer.data is not None
    first, second = (picture_of(entry.b64_json) for entry in answer.data)
    assert first.size == second.size == (64, 64)
    assert first.tobytes() != second.tobytes()
    assert first.info["prompt"] == answer.data[0].revised_prompt == "A MOMA artwork of: a coffee"
    assert (first.info["seed"], second.info["seed"], first.info["checkpoint"]) == ("3", "4", "tiny-64")


def test_a_seed_gives_the_same_picture_again(client: openai.OpenAI) -> None:
    fields = {"seed": 9, "steps": 3, "guidance_scale": 2, "negative_prompt": "red"}
    pictures = []
    for _ in range(2):
        answer = client.images.generate(model="momalisa", prompt="a boat", extra_body=fields)
        assert answer.data is not None
        pictures.append(picture_of(answer.data[0].b64_json).tobytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("prompt", ["", "x" * 100_000, 5, None, ["a"]])
def test_wrong_prompts_are_the_callers_error(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=prompt)
    assert caught.value.param == "prompt"


def test_a_body_over_a_megabyte(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(prompt="x" * 2_000_000)
    assert caught.value.status_code == 413


async def test_a_crowd_is_served_or_told_when_to_come_back(server: str) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as client:
        asked = [client.images.generate(prompt="a crowd", n=8, extra_body={"steps": 20, "seed": index}) for index in range(8)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
    served = [answer for answer in answers if not isinstance(answer, BaseException)]
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert len(served) + len(refused) == 8, answers
    assert len(served) >= 2
    assert len(refused) >= 1
    assert all(int(answer.response.headers["Retry-After"]) >= 1 for answer in refused)


def test_a_stream_shows_the_picture_on_its_way(client: openai.OpenAI) -> None:
    fields = {"seed": 3, "steps": 8}
    with client.images.generate(prompt="a coffee", stream=True, partial_images=2, extra_body=fields) as events:
        came = list(events)
    assert [event.type for event in came] == ["image_generation.partial_image"] * (len(came) - 1) + ["image_generation.completed"]
    assert [event.partial_image_index for event in came[:-1]] == list(range(len(came) - 1))
    assert len(came) > 1
    assert all(picture_of(event.b64_json).size == (64, 64) for event in came)
    whole = client.images.generate(prompt="a coffee", extra_body=fields)
    assert whole.data is not None
    assert picture_of(whole.data[0].b64_json).tobytes() == picture_of(came[-1].b64_json).tobytes()


async def test_an_edit_streams_too(server: str) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(sink, "PNG")
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60) as client:
        asked = {"steps": "4", "strength": "0.5", "seed": "1"}
        events = await client.images.edit(
            image=("red.png", sink.getvalue()), prompt="a red boat", stream=True, partial_images=1, extra_body=asked
        )
        came = [event async for event in events]
    assert came[-1].type == "image_edit.completed"
    assert picture_of(came[-1].b64_json).info["strength"] == "0.5"


def test_a_caller_who_leaves_gives_the_rows_back(server: str) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
    body = json.dumps({"prompt": "x", "n": 8, "steps": 100, "stream": False})
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    until = time.monotonic() + 20
    while metric(server, "momalisa_pending_row_steps") < 500:
        assert time.monotonic() < until, "it was never painted"
        time.sleep(0.05)
    connection.close()
    while metric(server, 'momalisa_outcomes_total{outcome="left"') < 1:
        assert time.monotonic() < until, "it is painted for nobody"
        time.sleep(0.05)


def metric(server: str, name: str) -> float:
    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_job_is_looked_after_and_fetched(client: openai.OpenAI, server: str) -> None:
    import httpx

    with httpx.Client(base_url=server, timeout=30) as http:
        job = http.post("/v1/jobs", json={"prompt": "a coffee", "seed": 3}).raise_for_status().json()
        with http.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
            assert "event: image_generation.completed" in "".join(events.iter_text())
        done = http.get(f"/v1/jobs/{job['id']}").json()
        assert done["status"] == "completed"
        picture_of(done["result"]["data"][0]["b64_json"])
        long = http.post("/v1/jobs", json={"prompt": "a coffee", "steps": 100, "n": 8}).json()
        states = [http.delete(f"/v1/jobs/{long['id']}").json()["status"] for _ in range(2)]
    assert states == ["cancelled", "cancelled"]


def test_health_models_and_page(server: str, client: openai.OpenAI) -> None:
    with urllib.request.urlopen(f"{server}/healthz", timeout=10) as answer:
        health = json.load(answer)
    assert (health["status"], health["checkpoint"], health["trial"], health["problem"]) == ("ok", "tiny-64", None, None)
    assert [model.id for model in client.models.list()] == ["tiny-64"]
    with urllib.request.urlopen(server, timeout=10) as answer:
        assert b"MOMA Lisa" in answer.read()
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(f"{server}/nothing", timeout=10)
    caught.value.close()


def test_what_visitors_type_is_in_none_of_rays_logs(client: openai.OpenAI) -> None:
    import ray

    word, sink = f"quagga{uuid.uuid4().hex}", io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(sink, "PNG")
    visits = [f"visit-{uuid.uuid4().hex}" for _ in range(4)]
    named = [{"extra_headers": {"X-Request-ID": visit}} for visit in visits]
    client.images.generate(prompt=word, extra_body={"negative_prompt": word}, **named[0])
    client.images.edit(image=sink.getvalue(), prompt=word, **named[1])
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt=word, extra_body={"sampler": word}, **named[2])
    with pytest.raises(openai.BadRequestError):
        client.images.edit(image=word.encode(), prompt=word, **named[3])
    context = ray.get_runtime_context()
    logs = Path(context.get_temp_dir(), context.get_session_name(), "logs")
    end, said = time.monotonic() + 20, ""
    while not all(visit in said for visit in visits):  # a line may be written after its answer
        assert time.monotonic() < end, "the requests are not logged at all"
        time.sleep(0.2)
        said = "".join(file.read_bytes().decode(errors="replace") for file in logs.rglob("*") if file.is_file())
    assert word not in said


def test_the_config_file_is_one_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import ServeArgs

    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    application = schema.applications[0]
    assert application.import_path == "serve.app:build"
    assert ServeArgs.model_validate(application.args)
    assert {deployment.name for deployment in application.deployments} == {"Http", "Generator"}
