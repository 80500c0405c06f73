"""serve/config.yaml on a Ray of its own, behind TLS: from no replica to one, a promotion under load, two replicas, none.

python -m pytest -m slow -s tests/integration/test_serve_elastic.py        -s: with its figures
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from momalisa import checkpoint
from momalisa.storage import Store
from tests.serve.test_watch import promote, publish

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PATH = "/v1/images/generations"
DRIVER = """
import logging, select, sys, yaml, ray
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema
schema = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1])))
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         object_store_memory=200 * 2**20)
client = serve_start(http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location)
client.deploy_apps(schema)
while not select.select([sys.stdin], [], [], 0.3)[0]:
    found = serve.status().applications["momalisa"].deployments.get("Generator")
    print("replicas", sum(found.replica_states.values()) if found else 0, flush=True)
serve.shutdown()
ray.shutdown()
"""


def certificate(directory: Path) -> tuple[Path, Path]:
    """A key, and a certificate for this machine that it signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "museum")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1), [])
    signed = made.add_extension(address, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "key.pem").write_bytes(private)
    (directory / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return directory / "key.pem", directory / "cert.pem"


@dataclass
class Server:
    """`replicas`: how many generators there are."""

    address: str
    store: Store
    trusted: ssl.SSLContext
    process: subprocess.Popen[str]
    replicas: int = -1
    answers: Counter[int] = field(default_factory=Counter)

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("replicas "):
                self.replicas = int(line.split()[1])

    def open(self) -> bool:
        """Whether the HTTP layer answers; no generator is asked."""
        try:
            return httpx.get(f"{self.address}/openapi.json", verify=self.trusted, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.address, verify=self.trusted, timeout=240, limits=limits)

    async def until(self, what: Callable[[], bool], within_s: float) -> float:
        """Seconds until it was so."""
        started = time.monotonic()
        while not what():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < started + within_s, f"not within {within_s} s; {self.replicas} replicas"
            await asyncio.sleep(0.05)
        return time.monotonic() - started


@pytest.fixture(scope="module")
def server(promoted_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("elastic")
    store = Store(str(shutil.copytree(promoted_root, directory / "root")))
    key, cert = certificate(directory)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    settings["http_options"] |= {"port": port, "ssl_keyfile": str(key), "ssl_certfile": str(cert)}
    application = settings["applications"][0]
    chosen = {"size_px": 64, "steps": 2, "threads": 1, "watch_s": 0.2, "canary_s": 2, "canary_share": 0.05}
    application["args"]["overrides"] = [f"--root={store.root}", *(f"--serve.{name}={value}" for name, value in chosen.items())]
    generator = next(one for one in application["deployments"] if one["name"] == "Generator")
    delays = {"upscale_delay_s": 1, "downscale_delay_s": 2, "metrics_interval_s": 1, "look_back_period_s": 2}
    generator["autoscaling_config"] |= {"min_replicas": 0, **delays}
    generator["autoscaling_config"]["policy"]["policy_kwargs"]["target_wait_s"] = 0.3
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    reported = {f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1" for who in ("REPLICA", "HANDLE")}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(directory / "config.yaml")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", **reported},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    made = Server(f"https://127.0.0.1:{port}", store, ssl.create_default_context(cafile=str(cert)), process)
    listener = threading.Thread(target=made.listen)
    listener.start()
    try:
        asyncio.run(made.until(lambda: made.replicas == 0 and made.open(), 240))
        yield made
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
        listener.join()
        assert process.stdout is not None
        process.stdout.close()


async def painted(server: Server, client: httpx.AsyncClient, **asked: Any) -> set[str]:
    """Whose the pictures of one request are; none where it failed."""
    answer = await client.post(PATH, json={"prompt": "a boat", **asked})
    server.answers[answer.status_code] += 1
    return {entry["checkpoint"] for entry in answer.json().get("data", [])}


async def test_the_first_visitor_wakes_a_replica_over_tls(server: Server) -> None:
    assert server.replicas == 0
    async with httpx.AsyncClient(timeout=10) as stranger:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await stranger.get(f"{server.address}/openapi.json")
        with pytest.raises(httpx.HTTPError):
            await stranger.get(f"{server.address.replace('https', 'http')}/openapi.json")
    async with server.client() as client:
        started = time.monotonic()
        assert await painted(server, client) == {"tiny-64"}
        print(f"\nfrom no replica to the first picture: {time.monotonic() - started:.1f} s")
        started = time.monotonic()
        assert await painted(server, client) == {"tiny-64"}
        print(f"the second picture: {time.monotonic() - started:.2f} s")


async def test_a_promotion_under_load_fails_no_request_and_changes_none(server: Server, tmp_path: Path) -> None:
    server.answers.clear()
    stop = asyncio.Event()
    long: list[tuple[float, set[str]]] = []  # when it ended, whose pictures they are

    async def quick_visitor(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            await painted(server, client)

    async def long_visitor(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            whose = await painted(server, client, steps=100, n=4)
            long.append((time.monotonic(), whose))

    async def served(client: httpx.AsyncClient) -> str:
        return str((await client.get("/healthz")).json()["checkpoint"])

    path = publish(server.store, tmp_path, 128)
    async with server.client() as client:
        visitors = [asyncio.create_task(long_visitor(client)) for _ in range(4)]
        visitors += [asyncio.create_task(quick_visitor(client)) for _ in range(2)]
        await asyncio.sleep(1)
        started = time.monotonic()
        promote(server.store, path)
        while await served(client) != "tiny-128":
            assert time.monotonic() < started + 120, "it was never served"
            await asyncio.sleep(0.01)
        swapped_at = time.monotonic()
        new = 0
        while new < 10:
            assert time.monotonic() < swapped_at + 90, "the old one is still served"
            new = new + 1 if await painted(server, client) == {"tiny-128"} else 0
        stop.set()
        await asyncio.gather(*visitors)
    across = sum(whose == {"tiny-64"} and ended > swapped_at for ended, whose in long)
    print(
        f"\npromoted in {swapped_at - started:.1f} s; answers {dict(server.answers)}; {across} ended on the old weights after it"
    )
    assert set(server.answers) == {200}
    assert all(len(whose) == 1 for _, whose in long)
    assert across >= 1
    assert checkpoint.read_best(server.store).id == "tiny-128"


async def test_a_second_replica_comes_with_the_work(server: Server) -> None:
    server.answers.clear()
    async with server.client() as client:

        async def visitor() -> None:
            while True:
                await painted(server, client, steps=50, n=4)
                await asyncio.sleep(0.2)

        visitors = [asyncio.create_task(visitor()) for _ in range(6)]
        up_s = await server.until(lambda: server.replicas == 2, 120)
        drawing = set[str]()
        while len(drawing) < 2:
            await asyncio.sleep(0.5)
            assert not any(one.done() for one in visitors)
            text = (await client.get("/metrics")).text
            ticks = [line for line in text.splitlines() if line.startswith("momalisa_tick_rows_count")]
            drawing = {line for line in ticks if not line.endswith(" 0.0")}
        for one in visitors:
            one.cancel()
        await asyncio.gather(*visitors, return_exceptions=True)
        print(f"\na second replica after {up_s:.1f} s of load")
        assert await painted(server, client) == {"tiny-128"}
    assert set(server.answers) <= {200, 429}


async def test_replicas_go_without_work(server: Server) -> None:
    down_s = await server.until(lambda: server.replicas == 0, 90)
    print(f"\nno replica {down_s:.1f} s after the last answer")
