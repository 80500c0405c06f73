"""What visitors type is in no log, whatever becomes of their requests, and however much is logged."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api import create_app
from serve.replica import Generator
from serve.scheduler import Scheduler
from serve.task import Event, Failed, GenerationTask, Rejected
from tests.serve.conftest import LIMITS
from tests.serve.double import loaded, nan
from tests.serve.test_api import Crashing, FakeBackend
from tests.serve.test_edits import png

WORD = "quagga"
PATH = "/v1/images/generations"
ASKED = {"prompt": f"a {WORD}", "negative_prompt": f"no {WORD}", "steps": 2}
FORM = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nquagga\r\n'

Logged = Callable[[], str]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Logged:
    """All that was said since, by every logger at every level, and on stdout and stderr."""
    caplog.set_level(logging.DEBUG)

    def text() -> str:
        return caplog.text + "".join(capfd.readouterr())

    return text


def client_of(backend: Any, **limits: Any) -> httpx.AsyncClient:
    app = create_app(backend, LIMITS.model_copy(update=limits))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://museum")


async def test_words_that_are_painted(generator: Generator, logged: Logged) -> None:
    long = {**ASKED, "prompt": f"{WORD} " * 25}  # more than the text encoder reads
    async with client_of(generator) as client:
        answers = [await client.post(PATH, json=body) for body in (ASKED, long, {**ASKED, "stream": True, "partial_images": 1})]
        answers.append(await client.post("/v1/images/edits", data=ASKED, files={"image": (f"{WORD}.png", png())}))
        job = (await client.post("/v1/jobs", json=ASKED)).json()
        answers.append(await client.get(f"/v1/jobs/{job['id']}/events"))
    assert [answer.status_code for answer in answers] == [200] * 5
    said = logged()
    assert all(answer.headers["X-Request-ID"] in said for answer in answers)
    assert WORD not in said


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        (PATH, json.dumps({"prompt": WORD * 100}).encode(), "application/json"),
        (PATH, json.dumps({"prompt": [WORD]}).encode(), "application/json"),
        (PATH, json.dumps({**ASKED, "steps": WORD}).encode(), "application/json"),
        (PATH, json.dumps({**ASKED, "sampler": WORD}).encode(), "application/json"),
        (PATH, f'{{"prompt": "{WORD}"'.encode(), "application/json"),
        ("/v1/comparisons", json.dumps(ASKED).encode(), "application/json"),
        ("/v1/images/edits", FORM, "multipart/form-data; boundary=x"),
        ("/v1/images/edits", FORM + b"--x--\r\n", "multipart/form-data; boundary=x"),
        ("/v1/images/edits", json.dumps(ASKED).encode(), "application/json"),
    ],
)
async def test_words_that_are_refused(logged: Logged, path: str, body: bytes, kind: str) -> None:
    async with client_of(FakeBackend()) as client:
        answer = await client.post(path, content=body, headers={"Content-Type": kind})
    assert answer.status_code in (400, 409), answer.text
    said = logged()
    assert answer.headers["X-Request-ID"] in said
    assert WORD not in said


async def test_words_that_are_forbidden(tmp_path: Path, logged: Logged) -> None:
    words = tmp_path / "words.txt"
    words.write_text(WORD)
    async with client_of(FakeBackend(), forbidden_words=str(words)) as client:
        answer = await client.post(PATH, json=ASKED)
    assert answer.json()["error"]["code"] == "content_filtered"
    assert WORD not in logged()


@pytest.mark.parametrize("backend", [Crashing(), FakeBackend(Rejected(7)), FakeBackend(Failed("lost", retry=True))])
async def test_words_of_requests_that_fail(backend: FakeBackend, logged: Logged) -> None:
    async with client_of(backend) as client:
        answer = await client.post(PATH, json=ASKED)
    assert answer.status_code in (429, 500, 503)
    said = logged()
    assert answer.headers["X-Request-ID"] in said
    assert WORD not in said


class Painters(FakeBackend):
    """A scheduler alone."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        async for event in self.scheduler.generate(task):
            yield event


def dies(_: Any) -> Any:
    raise ZeroDivisionError("not a number of cups")


@pytest.mark.parametrize("fails", ["the engine", "a picture", "finishing"])
async def test_words_of_pictures_that_fail(fails: str, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.meters import Meters

    main = loaded(spoil={"the engine": dies, "a picture": nan}.get(fails))
    monkeypatch.setattr("serve.finishing.to_parameters", dies)
    scheduler = Scheduler(main, LIMITS, Meters())
    async with client_of(Painters(scheduler)) as client:
        answer = await client.post(PATH, json=ASKED)
    await asyncio.to_thread(scheduler.close)
    assert answer.status_code in (500, 503)
    said = logged()
    assert {"the engine": "thread ends", "a picture": "NaN", "finishing": "could not be finished"}[fails] in said
    assert WORD not in said
