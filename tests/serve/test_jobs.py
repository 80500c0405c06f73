"""Jobs and streams over the real generator: followed, fetched, cancelled, forgotten; a reader that stops reading."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve.answers import collect
from serve.api import create_app
from serve.errors import ApiError
from serve.jobs import Jobs
from serve.mailbox import Mailbox
from serve.stream import EventStream
from serve.task import Completed, Event, Failed, GenerationTask, Outcome, Picture, Progress, Rejected, State, Waiting
from tests.serve.conftest import LIMITS, listening

TASK = GenerationTask("x", (0,), 1, 1.0, 64, key="me")


class Slow:
    """A backend that tells its place and then waits to be let go."""

    def __init__(self, outcome: Outcome | None = None) -> None:
        self.go, self.closed = asyncio.Event(), 0
        self.outcome = outcome or Completed("fake-1")

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        try:
            if isinstance(self.outcome, Rejected):
                yield self.outcome
                return
            yield Waiting(2, 7.5)
            await self.go.wait()
            yield Progress(0, 1, 2, b"preview")
            yield Picture(0, b"png", "fake-1")
            yield self.outcome
        finally:
            self.closed += 1

    async def state(self) -> State:
        return State("fake-1")

    async def metrics(self) -> list[tuple[str, str]]:
        return []


def client_of(backend: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(backend, LIMITS), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://museum")


def events_in(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("event: ")]
    return [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]


async def test_a_job_from_the_line_to_its_picture(client: httpx.AsyncClient) -> None:
    started = await client.post("/v1/jobs", json={"prompt": "a boat", "seed": 5, "n": 2})
    assert started.status_code == 202
    job = started.json()
    assert started.headers["Location"] == f"/v1/jobs/{job['id']}"
    events = events_in((await client.get(f"/v1/jobs/{job['id']}/events")).text)
    assert [name for name, _ in events] == ["image_generation.completed"] * 2
    done = (await client.get(f"/v1/jobs/{job['id']}")).json()
    assert done["status"] == "completed"
    assert [entry["seed"] for entry in done["result"]["data"]] == [5, 6]
    again = events_in((await client.get(f"/v1/jobs/{job['id']}/events")).text)
    assert len(again) == 2  # a late reader gets everything too


async def test_a_job_tells_its_place_and_two_cancels_are_one() -> None:
    backend = Slow()
    async with client_of(backend) as client:
        job = (await client.post("/v1/jobs", json={"prompt": "x"})).json()
        assert (job["status"], job["position"], job["eta_s"]) == ("queued", 2, 7.5)
        path = f"/v1/jobs/{job['id']}"
        states = [(await client.delete(path)).json()["status"] for _ in range(2)]
        assert states == ["cancelled", "cancelled"]
        await asyncio.sleep(0.01)
        assert backend.closed == 1
        assert events_in((await client.get(f"{path}/events")).text)[0][0] == "error"
        assert (await client.get("/v1/jobs/job_nothing")).status_code == 404


async def test_a_full_line_and_a_full_store_refuse_jobs() -> None:
    async with client_of(Slow(Rejected(7))) as client:
        answer = await client.post("/v1/jobs", json={"prompt": "x"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
    backend = Slow()
    jobs = Jobs(backend, 2, 10**6, 60)
    for _ in range(2):
        await jobs.start(TASK)
    with pytest.raises(ApiError, match="2 jobs are under way already; try again in 8 s"):
        await jobs.start(TASK)


async def test_jobs_are_forgotten_and_are_their_owners() -> None:
    now = 0.0
    jobs = Jobs(Slow(Failed("no")), 2, 10**6, 60, lambda: now)
    job = await jobs.start(TASK)
    with pytest.raises(ApiError):
        jobs.get(job.id, "somebody else")
    jobs._backend.go.set()  # type: ignore[attr-defined]
    assert job.runner is not None
    await job.runner
    now = 59.0
    assert jobs.get(job.id, "me").body()["error"]["code"] == "generation_failed"
    now = 61.0
    with pytest.raises(ApiError, match="is kept no longer") as caught:
        jobs.get(job.id, "me")
    assert caught.value.status == 410
    with pytest.raises(ApiError, match="there is no job"):
        jobs.get(job.id, "somebody else")
    assert len(jobs) == 0


class Quick(Slow):
    """Pictures of 100 bytes at once, or, for steps above 1, never."""

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        yield Waiting(0, 1.0)
        if task.steps > 1:
            await asyncio.Event().wait()
        yield Picture(0, b"x" * 100, "fake-1")
        yield Completed("fake-1")


@pytest.mark.parametrize(("max_jobs", "max_bytes"), [(4, 10**6), (10, 350)])
async def test_the_oldest_finished_jobs_go_first_and_none_that_is_under_way(max_jobs: int, max_bytes: int) -> None:
    jobs = Jobs(Quick(), max_jobs, max_bytes, 60)
    waiting = await jobs.start(replace(TASK, steps=2))
    made = []
    for _ in range(8):
        made.append(await jobs.start(TASK))
        assert made[-1].runner is not None
        await made[-1].runner
    assert waiting.status == jobs.get(waiting.id, "me").status == "running"
    assert [jobs.get(job.id, "me").status for job in made[5:]] == ["completed"] * 3
    assert len(jobs) == 4
    for job in made[:5]:
        with pytest.raises(ApiError) as caught:
            jobs.get(job.id, "me")
        assert (caught.value.status, caught.value.code) == (410, "job_gone")
    jobs.cancel(waiting)


async def test_who_keeps_most_gives_way_first() -> None:
    jobs = Jobs(Quick(), 10, 350, 60)
    mine = await jobs.start(replace(TASK, key="me"))
    assert mine.runner is not None
    await mine.runner
    crowd = []
    for _ in range(8):
        crowd.append(await jobs.start(replace(TASK, key="crowd")))
        assert crowd[-1].runner is not None
        await crowd[-1].runner
    assert jobs.get(mine.id, "me").status == "completed"
    assert [jobs.get(job.id, "crowd").status for job in crowd[6:]] == ["completed"] * 2
    full = Jobs(Quick(), 4, 10**6, 60)
    kept = await full.start(replace(TASK, key="me"))
    assert kept.runner is not None
    await kept.runner
    under_way = [await full.start(replace(TASK, key="crowd", steps=2)) for _ in range(2)]
    done = await full.start(replace(TASK, key="crowd"))
    assert done.runner is not None
    await done.runner
    under_way.append(await full.start(replace(TASK, key="crowd", steps=2)))
    assert full.get(kept.id, "me").status == "completed"
    for job in under_way:
        full.cancel(job)


class Cold(Slow):
    """A generator that is starting: it says nothing."""

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        try:
            self.go.set()
            await asyncio.Event().wait()
            yield Waiting(0, 1.0)
        finally:
            self.closed += 1


@pytest.mark.parametrize(("path", "stream"), [("/v1/jobs", False), ("/v1/images/generations", True)])
async def test_who_leaves_during_a_cold_start_leaves_nothing_behind(path: str, stream: bool) -> None:
    backend, sent = Cold(), list[int]()
    body = json.dumps({"prompt": "x", "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await backend.go.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message.get("status", 0))

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": [], "client": ("10.0.0.1", 1)}
    await asyncio.wait_for(create_app(backend, LIMITS)(scope, receive, send), 10)  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    assert (backend.closed, sent[0]) == (1, 499)


async def test_a_stream_has_openais_events_and_tells_the_place_in_comments() -> None:
    backend = Slow()
    backend.go.set()
    async with client_of(backend) as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "x", "stream": True, "seed": 4})
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.text.startswith(': {"position": 2, "eta_s": 7.5}\n\n')
    events = events_in(answer.text)
    assert [name for name, _ in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert events[0][1]["partial_image_index"] == 0
    assert events[1][1]["seed"] == 4


async def test_a_full_line_is_a_429_and_no_stream() -> None:
    async with client_of(Slow(Rejected(7))) as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "x", "stream": True})
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")


@pytest.mark.parametrize(
    ("outcome", "code"), [(Failed("lost", retry=True), "unavailable"), (Failed("x", late=True), "deadline_exceeded")]
)
async def test_a_stream_that_fails_says_so(outcome: Outcome, code: str) -> None:
    backend = Slow(outcome)
    backend.go.set()
    async with client_of(backend) as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "x", "stream": True})
    name, data = events_in(answer.text)[-1]
    assert (name, data["error"]["code"]) == ("error", code)


async def test_a_reader_that_stops_reading_is_left_and_nothing_piles_up() -> None:
    made, ended = 0, False

    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal made, ended
        try:
            while True:
                made += 1
                yield b"data: x\n\n"
        finally:
            ended = True

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await asyncio.wait_for(EventStream(endless(), stall_s=0.05)({"type": "http"}, never, stuck), 5)
    assert (made, ended) == (1, True)


class Endless(Slow):
    """A backend whose previews do not end: `made` counts them."""

    made = 0

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        try:
            while True:
                self.made += 1
                yield Progress(0, self.made, 1 << 30, bytes(1 << 18))
                await asyncio.sleep(0)
        finally:
            self.closed += 1


def test_a_client_that_stops_reading_its_socket_is_left() -> None:
    backend = Endless()
    with listening(create_app(backend, LIMITS.model_copy(update={"stall_s": 0.2}))) as address, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        client.connect(("127.0.0.1", int(address.rpartition(":")[2])))
        body = b'{"prompt": "x", "stream": true, "partial_images": 3}'
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: museum\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert client.recv(12) == b"HTTP/1.1 200"
        end = time.monotonic() + 20
        while not backend.closed and time.monotonic() < end:
            time.sleep(0.02)
        assert backend.closed == 1
        assert backend.made << 18 < 1 << 25  # what the kernel keeps for a socket, and one event


async def test_a_mailbox_that_nobody_reads_holds_one_of_a_kind() -> None:
    box = Mailbox()
    for number in range(1000):
        box.post(Waiting(number, 1.0))
        box.post(Progress(0, number, 1000, b"preview"))
    box.post(Picture(0, b"png", "x"))
    box.post(Completed("x"))
    await asyncio.sleep(0.01)
    assert len(box) == 4
    events = [event async for event in box.events()]
    assert events == [Waiting(999, 1.0), Progress(0, 999, 1000, b"preview"), Picture(0, b"png", "x"), Completed("x")]


async def test_a_generator_that_says_nothing_more_is_a_503() -> None:
    class Lost(Slow):
        async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
            yield Waiting(1, 1.0)

    with pytest.raises(ApiError) as caught:
        await collect(Lost(), TASK)
    assert caught.value.status == 503


async def test_a_trace_tells_the_ticks(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/images/generations?debug=trace", json={"prompt": "x", "steps": 3})
    trace = answer.json()["trace"]
    assert [tick["rows"] for tick in trace][:3] == [1, 1, 1]
    assert {tick["checkpoint"] for tick in trace} == {"tiny-64"}
