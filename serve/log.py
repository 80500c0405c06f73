"""One line of JSON a request, with an id that is also in its answer; never a prompt, a key or a picture."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError
from serve.meters import HttpMeters

logger = logging.getLogger("serve.requests")
failures = logging.getLogger("serve.failures")
GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


class RequestLog:
    """ASGI middleware. A caller's own `X-Request-ID` is kept if it is a plain word."""

    def __init__(self, app: ASGIApp, meters: HttpMeters) -> None:
        self.app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if GOOD_ID.match(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 499  # where no answer is begun, the client has left

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            seconds, route = time.monotonic() - started, getattr(scope.get("route"), "path", "other")
            self._meters.requests.labels(route, str(status)).inc()
            self._meters.latency_s.labels(route).observe(seconds)
            line = {
                "request_id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
                "caller": scope.get("state", {}).get("caller", ""),
            }
            logger.info("%s", json.dumps(line))


class ServerErrors:
    """ASGI middleware around the routes: what nobody expected is logged with the request's id, and answered with a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            request_id = scope.get("state", {}).get("request_id", "")
            failures.exception("request %s failed", request_id)
            if begun or scope["type"] != "http":
                raise
            error = ApiError(500, f"the server failed: its log says why, at request {request_id}", kind="server_error")
            await JSONResponse(error.body(), error.status)(scope, receive, send)
