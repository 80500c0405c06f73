"""Five times more visitors than the server can paint for, over loopback, with the miniature's real weights.

python -m pytest -m slow tests/integration/test_load.py                        20 s
MOMALISA_LOAD_S=120 python -m pytest -m slow -s tests/integration/test_load.py     two minutes, and its figures
MOMALISA_LOAD_THREADS=1 ...                        painted by one thread: other cores are left to HTTP and the visitors
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import pytest

from serve.turns import MAX_S

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(600)]

SECONDS = float(os.environ.get("MOMALISA_LOAD_S", "20"))
THREADS = os.environ.get("MOMALISA_LOAD_THREADS", "null")  # null: as many as there are cores
ROOT = Path(__file__).parents[2]
TIMES = 5
ROW_STEPS = 2 * 20  # of a guided picture
SERVER = """
import socket, sys, uvicorn
from momalisa import config
from serve.api import create_app
from serve.replica import Generator
settings = config.from_file("configs/demo.yaml", ["--root=" + sys.argv[1], "--serve.precision=bf16", "--serve.watch_s=0",
    "--serve.max_rows=16", "--serve.max_waiting_rows=48", "--serve.max_waiting_rows_per_key=48",
    "--serve.threads=" + sys.argv[3]])
generator = Generator(settings)
listener = socket.socket(fileno=int(sys.argv[2]))
uvicorn.Server(uvicorn.Config(create_app(generator, settings.serve), log_level="warning")).run(sockets=[listener])
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    from momalisa import checkpoint
    from momalisa.config import Diffusion
    from momalisa.storage import Store

    root, weights = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("weights")
    diffusion, store = Diffusion(model="miniature://diffusion"), Store(str(root))
    checkpoint.save_weights(checkpoint.load_base_unet(diffusion), weights, lora=False)
    entry = checkpoint.Checkpoint("checkpoints/base/0", "base", 0, diffusion.model_dump(), files={})
    checkpoint.write(store, entry, weights)
    store.write_json(checkpoint.BEST, {"checkpoint": entry.path})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1000)
        command = [sys.executable, "-c", SERVER, str(root), str(listener.fileno()), THREADS]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[listener.fileno()])
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/healthz", timeout=5).status_code == 200:
                    break
            assert time.monotonic() < end, "the server did not start"
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
        yield address, psutil.Process(process.pid)
        process.terminate()
        process.wait(60)


class Usage:
    """Cores in use between two calls: the server's, its visitors' (this process), and whatever else runs on the machine."""

    def __init__(self, server: psutil.Process) -> None:
        self._server = server
        self._seen = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        """Seconds: the clock, and CPU time of the server, of this process, of the whole machine."""
        server, machine = self._server.cpu_times(), psutil.cpu_times()
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        return time.monotonic(), server.user + server.system, time.process_time(), busy

    def cores(self) -> tuple[float, float, float]:
        """(server, visitors, others) since the last call."""
        before, self._seen = self._seen, self._now()
        seconds, server, visitors, machine = (new - old for new, old in zip(self._seen, before, strict=True))
        return server / seconds, visitors / seconds, max(0.0, machine - server - visitors) / seconds


class Load:
    """Requests over one client."""

    def __init__(self, client: aiohttp.ClientSession) -> None:
        self.client = client
        self.statuses: Counter[int] = Counter()
        self.asked = 0
        self.waits: list[float] = []

    async def ask(self) -> None:
        self.asked += 1
        body = {"prompt": "a red boat", "seed": random.randrange(1000)}
        async with self.client.post("/v1/images/generations", json=body) as answer:
            await answer.read()
        self.statuses[answer.status] += 1
        if answer.status == 429:
            self.waits.append(float(answer.headers["Retry-After"]))

    async def closed(self, visitors: int, seconds: float) -> float:
        """So many visitors who ask again as soon as they have their picture -> pictures/s."""
        end = time.monotonic() + seconds

        async def visitor() -> None:
            while time.monotonic() < end:
                await self.ask()

        rate, *_ = await asyncio.gather(self.rate(seconds), *(visitor() for _ in range(visitors)))
        return rate

    async def opened(self, per_s: float, seconds: float) -> float:
        """Visitors who come by chance, so many a second, whatever becomes of those before -> pictures/s."""
        due, visitors = 0.0, []

        async def visitor(at: float) -> None:
            await asyncio.sleep(at)
            await self.ask()

        while (due := due + random.expovariate(per_s)) < seconds:
            visitors.append(visitor(due))
        rate, *_ = await asyncio.gather(self.rate(seconds), *visitors)
        return rate

    async def rate(self, seconds: float) -> float:
        """Pictures/s without the first fifth, in which the line fills.

        By the steps that were done: a batch's pictures end together, and whether one batch more ends in time is chance.
        """
        await asyncio.sleep(seconds / 5)
        before, start = await self.row_steps(), time.monotonic()
        await asyncio.sleep(seconds * 4 / 5)
        return (await self.row_steps() - before) / ROW_STEPS / (time.monotonic() - start)

    async def row_steps(self) -> float:
        """Since the server began."""
        async with self.client.get("/metrics") as answer:
            found = re.search(r"^momalisa_tick_rows_sum{.*} (.*)$", await answer.text(), re.MULTILINE)
        assert found is not None
        return float(found[1])


async def test_a_crowd_costs_the_served_nothing(server: tuple[str, Any]) -> None:
    address, process = server
    every = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=every, timeout=aiohttp.ClientTimeout(600)) as client:
        load = Load(client)
        await load.closed(8, 3)
        usage = Usage(process)
        before = await load.closed(16, SECONDS / 2)
        cores = [usage.cores()]
        memory = process.memory_info().rss
        good = await load.opened(TIMES * max(before, 1.0), SECONDS)  # a crowd on a busy machine too
        grown = process.memory_info().rss - memory
        cores.append(usage.cores())
        after = await load.closed(16, SECONDS / 2)
        cores.append(usage.cores())
    peak = (before + after) / 2
    print(
        f"\npeak {before:.2f} and {after:.2f} pictures/s, {good:.2f} at {TIMES}x ({good / peak:.0%}); "
        f"answers {dict(load.statuses)}; memory {memory / 2**20:.0f} MiB {grown / 2**20:+.0f}; "
        f"Retry-After {min(load.waits)} to {max(load.waits)} s"
    )
    for name, (own, visitors, others) in zip(("before", f"{TIMES}x", "after"), cores, strict=True):
        print(f"cores in use, {name}: server {own:.2f}, its visitors {visitors:.2f}, others {others:.2f}")
    assert set(load.statuses) == {200, 429}
    assert sum(load.statuses.values()) == load.asked
    assert all(1 <= wait <= MAX_S for wait in load.waits)
    assert grown < 64 * 2**20
