"""The HTTP layer: OpenAI's images API, jobs, health, metrics, and the visitors' page. Knows nothing of Ray or torch.

POST /v1/images/generations /v1/images/edits /v1/comparisons   /v1/jobs   GET /v1/models[/{id}]
GET /healthz /metrics /openapi.json /
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from momalisa import config
from serve import answers, bodies, checks, comparisons, uploads, wire
from serve.access import Access, Caller
from serve.comparisons import Comparisons
from serve.document import document
from serve.errors import ApiError, listed
from serve.jobs import Jobs
from serve.log import RequestLog, ServerErrors
from serve.meters import HttpMeters, gathered
from serve.stream import ClientLeft, EventStream, unless_left
from serve.task import Backend, Event, Failed, GenerationTask, Rejected, State, Unavailable

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

DECODERS = 2  # pictures that are decoded at once: each takes some 100 MB at the largest size that is allowed
WEB = Path(__file__).parent / "web"
PAGE_FILES = {"/": "index.html", "/style.css": "style.css", "/page.js": "page.js"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Service:
    """What every route needs. Raises ValueError for settings that name what is not there."""

    def __init__(self, backend: Backend, limits: config.Serve) -> None:
        self.backend, self.limits = backend, limits
        self.access, self.check = Access(limits.keys), checks.prompt_check(limits)
        self.jobs = Jobs(backend, limits.max_jobs, limits.max_jobs_bytes, limits.job_keep_s)
        self.comparisons = Comparisons(backend, limits.max_jobs, limits.job_keep_s, limits.votes_per_minute)
        self.uploads, self._decoding = bodies.UploadMemory(limits.upload_memory_bytes), asyncio.Semaphore(DECODERS)
        self.meters = HttpMeters()

    def caller(self, request: Request, scope: str) -> Caller:
        """Raises ApiError."""
        address = request.client.host if request.client else ""
        caller = self.access.caller(request.headers.get("Authorization"), address, scope)
        request.state.caller = caller.id if self.limits.keys else ""
        return caller

    async def task(self, request: Request, edit: bool = False) -> tuple[GenerationTask, wire.ImagesRequest]:
        """What is asked for, by somebody who may. Raises ApiError."""
        caller = self.caller(request, "edit" if edit else "generate")
        asked, image, mask = await (self._edit(request) if edit else self._generation(request))
        return self._accepted(request, caller, asked, image, mask), asked

    async def comparison(self, request: Request) -> GenerationTask:
        """One picture by each of two checkpoints. Raises ApiError."""
        caller = self.caller(request, "vote")
        fields = wire.from_json(await bodies.read(request, wire.MAX_BODY_BYTES))
        asked = wire.parse({name: value for name, value in fields.items() if name not in wire.NOT_COMPARED}, self.limits)
        task = self._accepted(request, caller, asked)
        if not (await self.state()).challenger:
            raise comparisons.nothing()
        return replace(task, seeds=task.seeds * 2, compare=True)

    def _accepted(
        self, request: Request, caller: Caller, asked: wire.ImagesRequest, image: bytes | None = None, mask: bytes | None = None
    ) -> GenerationTask:
        for text in (asked.prompt, asked.negative_prompt or ""):
            if reason := self.check(text):
                self.meters.refused_prompts.inc()
                raise answers.filtered(reason, "prompt")
        who = {"key": caller.id, "kiosk": caller.kiosk, "trace": request.query_params.get("debug") == "trace"}
        who["request_id"] = request.state.request_id
        return wire.generation_task(asked, self.limits, image, mask, **who)

    async def _generation(self, request: Request) -> tuple[wire.ImagesRequest, None, None]:
        return wire.parse(wire.from_json(await bodies.read(request, wire.MAX_BODY_BYTES)), self.limits), None, None

    async def _edit(self, request: Request) -> tuple[wire.ImagesRequest, bytes, bytes | None]:
        with self.uploads.upload() as take:
            body = await bodies.read(request, 2 * self.limits.max_upload_bytes, take)
            form = await uploads.read_form(request.headers.get("Content-Type", ""), body)
            for name, data in (("image", form.image), ("mask", form.mask or b"")):
                if len(data) > self.limits.max_upload_bytes:
                    message = f"{name} has {len(data)} bytes; at most {self.limits.max_upload_bytes} are taken"
                    raise ApiError(413, message, name, "body_too_large")
            asked = wire.parse(wire.from_form(form.fields), self.limits, wire.EditsRequest)
            size_px = wire.sizes(self.limits)[asked.size or "auto"]
            async with self._decoding:
                image, mask = await run_in_threadpool(uploads.prepare, form, size_px, self.limits)
        return asked, image, mask

    async def images(self, request: Request, edit: bool) -> Response:
        task, asked = await self.task(request, edit)
        if asked.stream:
            return await self._stream(request, task)
        pictures, completed = await unless_left(request, answers.collect(self.backend, task))
        return JSONResponse(answers.body(task, pictures, completed, as_url=asked.response_format == "url"))

    async def _stream(self, request: Request, task: GenerationTask) -> Response:
        """The first event decides: nothing can become a 429 once a stream has begun."""
        events = self.backend.generate(task)
        first = await unless_left(request, _first(events))
        if isinstance(first, Rejected | Failed):
            await events.aclose()
            raise answers.failure(first)
        return EventStream(_streamed(_with(first, events), task), self.limits.stall_s)

    async def state(self) -> State:
        return await _available(self.backend.state())

    async def models(self) -> list[dict[str, Any]]:
        """The served checkpoint, and the adapters that a request may name, where their store answers. Raises ApiError (503)."""
        served = _model((await self.state()).checkpoint)
        try:
            return [served, *await self._adapters(served)]
        except Unavailable as error:
            logger.warning("/v1/models lists the served checkpoint alone: %s", error)
            return [served]

    async def model(self, id_: str) -> dict[str, Any]:
        """Raises ApiError: 404 where there is none, 503 where an adapters' store does not say."""
        served = _model((await self.state()).checkpoint)
        if id_ == served["id"]:
            return served
        found = {one["id"]: one for one in [served, *await _available(self._adapters(served))]}
        if id_ not in found:
            raise ApiError(404, f"there is no model {id_[:60]!r}; {listed(list(found))}", code="model_not_found")
        return found[id_]

    async def _adapters(self, served: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**_model(name), "parent": served["id"]} for name in await self.backend.adapters()]


def _model(id_: str) -> dict[str, Any]:
    return {"id": id_, "object": "model", "created": 0, "owned_by": "momalisa"}


async def _available(asked: Awaitable[Answer]) -> Answer:
    """What a generator answers. Raises ApiError (503) where none does."""
    try:
        return await asked
    except Unavailable as error:
        raise answers.failure(Failed(str(error), retry=True)) from None


async def _first(events: AsyncGenerator[Event, None]) -> Event:
    return await anext(events, Failed("the generator was lost while it painted; try again", retry=True))


async def _with(first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


async def _streamed(events: AsyncGenerator[Event, None], task: GenerationTask) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for text in answers.stream(events, task):
            yield text


def create_app(backend: Backend, limits: config.Serve) -> FastAPI:
    """The ASGI app over a backend. What visitors may ask is in `limits`. Raises ValueError for a file that is not there."""
    service = Service(backend, limits)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(ServerErrors)  # the innermost: its answers get the headers of all the others
    if limits.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestLog, meters=service.meters)
    for kind, handler in ((ApiError, _api_error), (HTTPException, _http_error), (ClientLeft, _left)):
        app.add_exception_handler(kind, handler)
    _image_routes(app, service)
    _job_routes(app, service)
    _comparison_routes(app, service)
    _other_routes(app, service)
    return app


def _image_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        return await service.images(request, edit=False)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        return await service.images(request, edit=True)


def _job_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/jobs")
    async def start(request: Request) -> Response:
        edit = request.headers.get("Content-Type", "").lower().startswith("multipart/")
        task, _ = await service.task(request, edit)
        job = await unless_left(request, service.jobs.start(task))
        return JSONResponse(job.body(), 202, {"Location": f"/v1/jobs/{job.id}"})

    @app.get("/v1/jobs/{id_}")
    async def show(request: Request, id_: str) -> Response:
        return JSONResponse(service.jobs.get(id_, service.caller(request, "generate").id).body())

    @app.delete("/v1/jobs/{id_}")
    async def cancel(request: Request, id_: str) -> Response:
        job = service.jobs.get(id_, service.caller(request, "generate").id)
        service.jobs.cancel(job)
        return JSONResponse(job.body())

    @app.get("/v1/jobs/{id_}/events")
    async def events(request: Request, id_: str) -> Response:
        job = service.jobs.get(id_, service.caller(request, "generate").id)
        return EventStream(_streamed(job.follow(), job.task), service.limits.stall_s)


def _comparison_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/comparisons")
    async def compare(request: Request) -> Response:
        task = await service.comparison(request)
        return JSONResponse(await unless_left(request, service.comparisons.show(task)))

    @app.post("/v1/comparisons/{id_}/vote")
    async def vote(request: Request, id_: str) -> Response:
        caller = service.caller(request, "vote")
        body = await bodies.read(request, wire.MAX_BODY_BYTES)
        ballot = await service.comparisons.vote(id_, caller.id, wire.better(wire.from_json(body, wire.VOTE_EXAMPLE)))
        service.meters.votes.inc()
        return JSONResponse({"object": "image.vote", "better": ballot.winner, "other": ballot.loser})


def _other_routes(app: FastAPI, service: Service) -> None:
    openapi = document(service.limits, closed=bool(service.limits.keys))

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.caller(request, "generate")
        return JSONResponse({"object": "list", "data": await service.models()})

    @app.get("/v1/models/{id_:path}")  # an adapter's id has a slash
    async def model(request: Request, id_: str) -> Response:
        service.caller(request, "generate")
        return JSONResponse(await service.model(id_))

    @app.get("/healthz")
    async def healthz() -> Response:
        state = await service.state()
        what = state.problem.partition(": ")[0]  # why is for the log: it may hold the store's address
        shown = {"checkpoint": state.checkpoint, "trial": state.trial or None, "challenger": state.challenger or None}
        shown["problem"] = f"{what}; the log says why" if what else None
        return JSONResponse({"status": "ok", **shown, "picture_check": state.picture_check})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.caller(request, "metrics")
        service.meters.jobs.set(len(service.jobs))
        return Response(gathered(service.meters, await _available(service.backend.metrics())), media_type="text/plain")

    @app.get("/openapi.json")
    async def openapi_json() -> Response:
        return JSONResponse(openapi)

    for path, name in PAGE_FILES.items():
        app.add_api_route(path, _page(name), methods=["GET", "HEAD"], include_in_schema=False)


def _page(name: str) -> Any:
    async def page() -> FileResponse:
        return FileResponse(WEB / name, headers={"Cache-Control": "no-cache"})

    return page


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} here: {error.detail}; pictures are made by POST /v1/images/generations"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


async def _left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log does


class SecurityHeaders:
    """ASGI middleware: the same protective headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
