"""The HTTP layer: OpenAI's images API, health, and the visitors' page. Knows nothing of Ray or torch.

POST /v1/images/generations   GET /v1/models   GET /healthz   GET /
"""

from __future__ import annotations

import base64
import logging
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from momalisa import config
from serve import wire
from serve.wire import ApiError
from serve.work import Backend, Busy, Commission, Failed, Painted, Unavailable

logger = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
PAGE_FILES = {"/": "index.html", "/style.css": "style.css", "/page.js": "page.js"}
RETRY_AFTER_S = 5  # while a generator starts
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


def create_app(backend: Backend, limits: config.Serve) -> FastAPI:
    """The ASGI app over a backend. What visitors may ask is in `limits`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(SecurityHeaders)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _server_error)

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> JSONResponse:
        asked = wire.parse(await read_body(request, wire.MAX_BODY_BYTES), limits)
        commission = wire.commission(asked, limits)
        outcome = await backend.paint(commission)
        if isinstance(outcome, Busy):
            wait = outcome.retry_after_s
            message = f"{limits.max_waiting} requests are waiting already; try again in {wait} s"
            raise ApiError(429, message, code="queue_full", kind="rate_limit_error", retry_after_s=wait)
        if isinstance(outcome, Failed) and outcome.retry:
            raise _unavailable(outcome.message)
        if isinstance(outcome, Failed):
            raise ApiError(500, outcome.message, code="generation_failed", kind="server_error")
        return JSONResponse(_answer(commission, outcome, as_url=asked.response_format == "url"))

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        model = {"id": await _checkpoint(backend), "object": "model", "created": 0, "owned_by": "momalisa"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok", "checkpoint": await _checkpoint(backend)})

    for path, name in PAGE_FILES.items():
        app.add_api_route(path, _page(name), methods=["GET", "HEAD"], include_in_schema=False)
    return app


def _answer(commission: Commission, painted: Painted, as_url: bool) -> dict[str, Any]:
    data = []
    for png, seed in zip(painted.pngs, commission.seeds, strict=True):
        encoded = base64.b64encode(png).decode("ascii")
        picture = {"url": f"data:image/png;base64,{encoded}"} if as_url else {"b64_json": encoded}
        data.append({**picture, "revised_prompt": commission.prompt, "seed": seed})
    return {
        "created": int(time.time()),
        "model": painted.checkpoint,
        "size": f"{commission.size_px}x{commission.size_px}",
        "output_format": "png",
        "data": data,
    }


async def _checkpoint(backend: Backend) -> str:
    try:
        return await backend.checkpoint()
    except Unavailable as error:
        raise _unavailable(str(error)) from None


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable", kind="server_error", retry_after_s=RETRY_AFTER_S)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is longer than `limit` bytes."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise ApiError(413, f"the body is longer than {limit} bytes; a prompt needs far less", code="body_too_large")
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    return bytes(body)


def _page(name: str) -> Any:
    async def page() -> FileResponse:
        return FileResponse(WEB / name, headers={"Cache-Control": "no-cache"})

    return page


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} here: {error.detail}; pictures are made by POST /v1/images/generations"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


async def _server_error(_: Request, error: Exception) -> JSONResponse:
    logger.error("a request failed", exc_info=error)
    return JSONResponse(ApiError(500, "the server failed; its log says why", kind="server_error").body(), 500)


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
