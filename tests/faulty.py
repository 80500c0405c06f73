"""What stands between a program and a bucket, and misbehaves."""

from __future__ import annotations

import asyncio
import re

from aiohttp import ClientSession, web
from yarl import URL


class Faulty:
    """A reverse proxy before the bucket that answers as `mode` says: a storm of 503 and 429, a refusal, a lost answer, or none.

    `race`: two writers of refs/latest are let through together, when each has read what was there before the other.
    """

    def __init__(self, target: str) -> None:
        self.target, self.mode, self.asked, self.sent = target, "", 0, 0
        self.calm_until, self.refused = 0, 0  # the storm breaks with the request after so many
        self.racing, self.both = set[bytes](), asyncio.Event()  # manifests that refs/latest is to name
        self.over = False  # so that what was never answered ends
        self.too_late = 0  # writes that a precondition turned away
        self.app = web.Application(client_max_size=2**26)
        self.app.router.add_route("*", "/{path:.*}", self.answer)

    async def answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.mode == "storm" and self.asked > self.calm_until:
            self.refused += 1
            return self.said([503, 429][self.asked % 2], "try again later")
        if self.mode == "silent":
            self.mode = ""
            while not self.over:  # noqa: ASYNC110  # another thread says so
                await asyncio.sleep(0.05)
        if self.mode == "nobody":
            return self.said(401, "Anonymous caller does not have storage.objects.get access to the object.")
        if self.mode == "forbidden":
            return self.said(403, "curator@moma.iam does not have storage.objects.create access")
        if self.mode == "race" and request.method == "POST" and b"refs/latest" in (asked := await request.read()):
            self.racing.update(re.findall(rb"manifests/\w+", asked))
            if len(self.racing) == 2:
                self.both.set()
            async with asyncio.timeout(240):
                await self.both.wait()
        async with ClientSession(auto_decompress=False) as session:
            url = URL(f"{self.target}{request.rel_url.raw_path_qs}", encoded=True)
            kept = {key: value for key, value in request.headers.items() if key.lower() not in {"host", "content-length"}}
            async with session.request(request.method, url, data=await request.read(), headers=kept) as response:
                body = await response.read()
                self.sent += len(body)
                self.too_late += response.status == 412
                if self.mode == "lose" and request.method == "POST":
                    self.mode = ""
                    return self.said(503, "written, but nobody hears of it")
                dropped = {"content-length", "transfer-encoding", "connection"}
                headers = {key: value for key, value in response.headers.items() if key.lower() not in dropped}
                return web.Response(body=body, status=response.status, headers=headers)

    @staticmethod
    def said(status: int, message: str) -> web.Response:
        return web.json_response({"error": {"code": status, "message": message}}, status=status)
