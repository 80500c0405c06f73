"""RunPod's REST API v2 on this machine: pods as records, or real processes where a `Host` is given.

Every request and answer is validated against RunPod's OpenAPI document where that is at hand ($MOMALISA_SHARED/schemas).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

DOCUMENT = Path(os.environ.get("MOMALISA_SHARED", "../shared")) / "schemas" / "runpod-rest-v2.openapi.json"
KEY = "rpa_planted-secret-of-the-test"
GPUS = {"NVIDIA GeForce RTX 4090": 0.69, "NVIDIA A100-SXM4-80GB": 1.49, "NVIDIA H100 80GB HBM3": 2.99}
REFERENCE = re.compile(r"^\{\{ RUNPOD_SECRET_(\w+) \}\}$")


class Host(Protocol):
    """What makes a pod real."""

    def start(self, pod_id: str, env: dict[str, str]) -> str:
        """Returns the pod's private address."""

    def kill(self, pod_id: str) -> None: ...

    def alive(self, pod_id: str) -> bool: ...


@dataclass
class Fault:
    """What happens to the next `times` requests that match: `status`, or 0 for a lost connection; `after` acting on them."""

    method: str
    path: str
    status: int
    times: int = 1
    after: bool = False
    detail: str = "made to fail"
    retry_after: int | None = None


@dataclass
class FakeRunpod:
    host: Host | None = None
    starts_after_s: float = 0.0
    maps_after_s: float = 0.0
    secrets: dict[str, str] = field(default_factory=dict)
    without_capacity: set[str] = field(default_factory=set)  # GPU ids, or "GPU id@region"
    unpullable: set[str] = field(default_factory=set)  # images
    dying: int = 0  # so many of the next pods die while starting
    faults: list[Fault] = field(default_factory=list)
    down: bool = False
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)  # every name ever
    dearest: float = 0.0  # USD per hour of all pods that ever ran or started at a time
    terminated: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._validators = Validators() if DOCUMENT.is_file() else None
        self._forwards: dict[str, asyncio.Server] = {}

    # The server

    @contextlib.contextmanager
    def serving(self, address: str = "127.0.0.1") -> Iterator[FakeRunpod]:
        """In a thread, on a free port of an address."""
        loop, started = asyncio.new_event_loop(), threading.Event()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)

        async def start() -> None:
            await runner.setup()
            await web.TCPSite(runner, address, 0).start()

        def run() -> None:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(start())
            started.set()
            loop.run_forever()
            for forward in self._forwards.values():
                forward.close()
            loop.run_until_complete(runner.cleanup())
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(asyncio.sleep(0.05))  # for the transports to close
            loop.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        started.wait()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        self._loop = loop
        try:
            yield self
        finally:
            for pod_id in list(self.pods):
                self._remove(pod_id)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=10)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path, method = request.path, request.method
        self.asked.append(f"{method} {path}")
        if self.down:
            return problem(503, "Service Unavailable", "upstream is down")
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key != KEY and (pod_id := key.removeprefix(f"{KEY}-of-")) not in self.pods:
            return problem(401, "Unauthorized", "invalid bearer token")
        if key != KEY and (method, path) != ("DELETE", f"/v2/pods/{pod_id}"):
            return problem(403, "Forbidden", "access denied")
        fault = next((f for f in self.faults if f.times > 0 and f.method == method and re.fullmatch(f.path, path)), None)
        if fault:
            fault.times -= 1
            if fault.after:
                await self._act(request, path, method)
            if fault.status == 0:
                assert request.transport is not None
                request.transport.close()
                return web.Response()
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            return problem(fault.status, "Fault", fault.detail, headers)
        return await self._act(request, path, method)

    async def _act(self, request: web.Request, path: str, method: str) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        if (method, path) == ("GET", "/v2/pods"):
            return self._ok("ListPodsResponse", {"pods": [self._shown(pod_id) for pod_id in list(self.pods)]})
        if (method, path) == ("POST", "/v2/pods"):
            return await asyncio.to_thread(self._create, body)
        if (method, path) == ("GET", "/v2/catalog/gpus"):
            return self._ok("ListGpuTypesResponse", {"gpus": [gpu(name, price) for name, price in GPUS.items()]})
        if found := re.fullmatch(r"/v2/pods/(\w+)(/action|/logs)?", path):
            pod_id, rest = found.groups()
            if pod_id not in self.pods:
                return problem(404, "Not Found", "pod not found")
            if rest == "/logs":
                words = {"ts": "2026-01-01T00:00:00Z", "source": "system", "line": self.pods[pod_id]["words"]}
                return web.Response(text=f"id: 1\ndata: {json.dumps(words)}\n\n", content_type="text/event-stream")
            if method == "GET":
                return self._ok("Pod", self._shown(pod_id))
            if method == "DELETE" or (rest == "/action" and body["action"] == "terminate"):
                self.terminated.append(self.pods[pod_id]["body"]["name"])
                await asyncio.to_thread(self._remove, pod_id)
                return web.Response(status=204)
            if rest == "/action" and self._valid("PodActionRequest", body):
                self.pods[pod_id]["fate"] = "EXITED"
                return self._ok("Pod", self._shown(pod_id))
        return problem(404, "Not Found", f"{method} {path}")

    def _ok(self, schema: str, value: Any, status: int = 200) -> web.Response:
        if self._validators and (wrong := self._validators.errors(schema, value)):
            self.violations.append(f"answer {schema}: {wrong}")
        return web.json_response(value, status=status)

    def _valid(self, schema: str, value: Any) -> bool:
        wrong = self._validators.errors(schema, value) if self._validators else []
        self.violations += [f"request {schema}: {error}" for error in wrong]
        return not wrong

    # Pods

    def _create(self, body: dict[str, Any]) -> web.Response:
        if not self._valid("CreatePodRequest", body):
            return problem(422, "Unprocessable Entity", "Request validation failed.")
        wanted, regions = body["gpu"]["id"], body.get("dataCenterIds") or ["US-KS-2"]
        if wanted not in GPUS:
            return problem(400, "Bad Request", f"gpu {wanted} is not known")
        if wanted in self.without_capacity or f"{wanted}@{regions[0]}" in self.without_capacity:
            return problem(400, "Bad Request", "There are no instances currently available")
        pod_id = f"pod{len(self.made):04d}x"
        self.made.append(body["name"])
        price = GPUS[wanted] * body["gpu"]["count"]
        self.dearest = max(self.dearest, price + sum(self._price(there) for there in list(self.pods)))
        fate = "ERROR" if self.dying > 0 else "PROVISIONING" if body["image"] in self.unpullable else "RUNNING"
        self.dying -= fate == "ERROR"
        words = f"error pulling image {body['image']}: manifest unknown" if fate == "PROVISIONING" else "create container"
        self.pods[pod_id] = {
            "body": body, "region": regions[0], "made": time.time(), "fate": fate, "words": words, "public": 0, "ip": "10.0.0.7",
        }  # fmt: skip
        if self.host and fate == "RUNNING":
            self.pods[pod_id]["fate"] = "PROVISIONING"  # until it is a machine
            env = {key: self._filled(value) for key, value in body["env"].items()}
            own = {"RUNPOD_POD_ID": pod_id, "RUNPOD_API_KEY": f"{KEY}-of-{pod_id}"}  # RunPod's, whatever was asked for
            self.pods[pod_id]["ip"] = self.host.start(pod_id, {**env, **own})
            self.remap(pod_id)
            self.pods[pod_id]["fate"] = fate
        return self._ok("Pod", self._shown(pod_id, fresh=True), 201)

    def _price(self, pod_id: str) -> float:
        """USD per hour of a pod that runs or is starting."""
        gpu = self.pods[pod_id]["body"]["gpu"]
        return 0.0 if self.status(pod_id) in ("ERROR", "EXITED") else GPUS[gpu["id"]] * gpu["count"]

    def _filled(self, value: str) -> str:
        return self.secrets.get(found[1], "") if (found := REFERENCE.match(value)) else value

    def remap(self, pod_id: str) -> None:
        """Map the SSH port on a new port of this machine, as RunPod does when a pod restarts."""
        pod = self.pods[pod_id]
        private = int(pod["body"]["ports"][0].split("/")[0])

        async def forward() -> int:
            if pod_id in self._forwards:
                self._forwards.pop(pod_id).close()
            self._forwards[pod_id] = await asyncio.start_server(lambda r, w: pipe(r, w, pod["ip"], private), "127.0.0.1", 0)
            return int(self._forwards[pod_id].sockets[0].getsockname()[1])

        pod["public"] = asyncio.run_coroutine_threadsafe(forward(), self._loop).result(10)

    def vanish(self, pod_id: str) -> None:
        """A host dies: the pod is gone without a word."""
        self._remove(pod_id)

    def _remove(self, pod_id: str) -> None:
        if self.pods.pop(pod_id, None) is None:
            return
        if pod_id in self._forwards:
            self._loop.call_soon_threadsafe(self._forwards.pop(pod_id).close)
        if self.host:
            self.host.kill(pod_id)

    def status(self, pod_id: str) -> str:
        pod = self.pods[pod_id]
        if pod["fate"] == "EXITED":
            return "EXITED"
        if pod["fate"] == "RUNNING" and self.host and not self.host.alive(pod_id):
            return "ERROR"
        return pod["fate"] if time.time() - pod["made"] >= self.starts_after_s else "PROVISIONING"

    def _shown(self, pod_id: str, fresh: bool = False) -> dict[str, Any]:
        """A pod as the API shows it."""
        pod = self.pods[pod_id]
        body, status = pod["body"], "PROVISIONING" if fresh else self.status(pod_id)
        running, age = status == "RUNNING", time.time() - pod["made"]
        mapped = running and age >= self.starts_after_s + self.maps_after_s
        public = pod["public"] or 40_022
        port = int(body["ports"][0].split("/")[0])
        network: dict[str, Any] = {"enabled": bool(body.get("globalNetworking"))}
        if network["enabled"] and status != "PROVISIONING":
            network |= {"ip": pod["ip"], "internalDns": f"{pod_id}.runpod.internal"}
        cost = GPUS[body["gpu"]["id"]] * body["gpu"]["count"] if running else 0.0
        return {
            "id": pod_id, "name": body["name"], "status": status, "actions": ["terminate"], "image": body["image"], "args": "",
            "disk": body["disk"], "mounts": {}, "ports": body["ports"], "env": body["env"], "registry": None,
            "gpu": body["gpu"], "cloud": "SECURE", "dataCenterId": pod["region"], "cudaVersion": None,
            "ssh": {"proxy": None, "direct": None}, "template": None, "cost": cost, "locked": False, "globalNetworking": network,
            "runtime": {"uptime": int(age), "ports": [
                {"private": port, "public": public if mapped else None, "type": "tcp", "ip": "127.0.0.1" if mapped else None}
            ]} if running else None,
            "createdAt": datetime.fromtimestamp(pod["made"], UTC).isoformat(), "startedAt": None,
        }  # fmt: skip


class Validators:
    """RunPod's own schemas."""

    def __init__(self) -> None:
        from referencing import Registry, Resource
        from referencing.jsonschema import DRAFT202012

        resource = Resource.from_contents(json.loads(DOCUMENT.read_text()), default_specification=DRAFT202012)
        self._registry: Any = Registry().with_resource("urn:runpod", resource)

    def errors(self, schema: str, value: Any) -> list[str]:
        from jsonschema import Draft202012Validator

        validator = Draft202012Validator({"$ref": f"urn:runpod#/components/schemas/{schema}"}, registry=self._registry)
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, port: int) -> None:
    """What comes in on one connection goes out on another, both ways."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
        finally:
            sink.close()

    try:
        far_reader, far_writer = await asyncio.open_connection(address, port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))


def problem(status: int, title: str, detail: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"title": title, "status": status, "detail": detail}
    return web.Response(status=status, text=json.dumps(body), content_type="application/problem+json", headers=headers)


def gpu(name: str, price: float) -> dict[str, Any]:
    return {
        "id": name, "name": name, "pool": None, "manufacturer": "NVIDIA", "memory": 24, "secure": True, "community": False,
        "price": {"secure": price, "community": 0.0}, "maxCount": {"secure": 8, "community": 0},
    }  # fmt: skip
