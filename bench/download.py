"""download: pictures a second, ours and img2dataset's, from one server on this machine, on the same cores, in alternation.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install img2dataset==1.47.0
    python bench/download.py --peer-python /tmp/peer/bin/python [--peer default] [--record]

Both sides fetch the same JPEG files (about 100 KB each, 1024x768) with as many processes and connections, look at
X-Robots-Tag, hash what they fetch (SHA-256), and write Parquet.

    ours             the block that a task of the collect job runs, with the job's own settings: robots.txt read and every URL
                     judged by it, addresses resolved and judged, a turn waited for at the host (its caps are set so high that
                     they do not bind); then hygiene: the header is judged, every bit decoded at an eighth of the size,
                     metadata taken out, a perceptual hash and a thumbnail made. A clean JPEG keeps its coded pixels.
    peer: default    img2dataset as it comes, without resizing: decodes with OpenCV, encodes again (quality 95, 4:2:0)
    peer: kept       img2dataset with skip_reencode: decodes with OpenCV, stores what it fetched

img2dataset reads no robots.txt, judges no address, waits for no turn, and finds no duplicates. The rate is taken where it
is the same for both: by the server, from the first request for a picture to the last, so that neither start-up nor imports
count. Ray is not part of it: it brings a block of works to a process and its summary back. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from results import parser, processor, report

PEERS = ("default", "kept")
DIFFERENT = 64  # pictures; the server gives them many names
TARGET = 1.5
PEER = """
import json, sys
from img2dataset import download
if __name__ == "__main__":
    download(**json.loads(sys.argv[1]))
"""


def jpeg(seed: int, size_px: tuple[int, int] = (1024, 768)) -> bytes:
    """A picture of about 100 KB: blurred noise under grain."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(size_px, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 4.5, (size_px[1], size_px[0], 1))
    sink = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=82)
    return sink.getvalue()


class Museum(asyncio.Protocol):
    """HTTP/1.1 in a few lines, so that the server takes little of the cores: pictures, robots.txt, and its own clock."""

    pictures: ClassVar[list[bytes]] = []
    times: ClassVar[list[float]] = []

    def connection_made(self, transport: Any) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, self.received = self.received.split(b"\r\n\r\n", 1)
            self.answer(head.split(b" ", 2)[1].decode())
            if b"connection: close" in head.lower():
                self.transport.close()

    def answer(self, path: str) -> None:
        if path == "/times":
            self.say(json.dumps([self.times[0], self.times[-1], len(self.times)]).encode(), "application/json")
            self.times.clear()
        elif path == "/robots.txt":
            self.say(b"User-agent: *\nDisallow: /private\nDisallow: /*.php$\n", "text/plain")
        else:
            self.times.append(time.monotonic())
            self.say(self.pictures[int(path.strip("/").split(".")[0]) % DIFFERENT], "image/jpeg")

    def say(self, body: bytes, kind: str) -> None:
        head = f'HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nETag: "v1"\r\n\r\n'
        self.transport.write(head.encode() + body)


def serve(port: Any) -> None:
    """The server's process; puts its port into a pipe."""
    Museum.pictures = [jpeg(seed) for seed in range(DIFFERENT)]

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Museum, "127.0.0.1", 0, backlog=1024)
        port.send((server.sockets[0].getsockname()[1], sum(map(len, Museum.pictures)) // DIFFERENT))
        await server.serve_forever()

    asyncio.run(run())


@contextlib.contextmanager
def museum() -> Iterator[tuple[str, int]]:
    """The server's address, and the mean size of its pictures in bytes."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    port, size = ours.recv()
    try:
        yield f"http://127.0.0.1:{port}", size
    finally:
        process.terminate()
        process.join()


def rate(base: str, pictures: int) -> float:
    """Pictures a second since the last time, by the server's clock. Raises RuntimeError if some were not asked for."""
    import urllib.request

    with urllib.request.urlopen(f"{base}/times", timeout=10) as answer:  # noqa: S310
        first, last, count = json.load(answer)
    if count != pictures:
        raise RuntimeError(f"{count} requests for {pictures} pictures: this run measured something else")
    return (count - 1) / (last - first)


class Worker:
    """One of our processes: its share of the host, and what it has learned about it."""

    here: ClassVar[Worker]

    def __init__(self, shares: Any, root: str) -> None:
        from momalisa.collect.block import store_block
        from momalisa.collect.hosts import Hosts
        from momalisa.config import Collect
        from momalisa.records import Artwork

        self.settings = Collect(allow_private_addresses=True, requests_per_second=1e6)
        self.share, self.root, self.hosts = shares.get(), root, Hosts()
        self.work, self.store_block = Artwork, store_block
        Worker.here = self

    def block(self, urls: list[str]) -> int:
        works = [self.work(url.rpartition("/")[2], "", image_url=url) for url in urls]
        figures = self.store_block(self.root, works, self.settings, self.share, self.hosts, {}).figures
        self.hosts = figures.hosts
        return figures.ok


def our_block(urls: list[str]) -> int:
    """What one of our processes does with a block; returns how many pictures it stored."""
    return Worker.here.block(urls)


def ours(base: str, pictures: int, processes: int, connections: int, folder: Path) -> int:
    """Run our side: blocks are dealt to whoever is free, as the job does. Returns how many pictures are in its Parquet files."""
    from momalisa.collect.pace import Share
    from momalisa.config import Collect

    urls = [f"{base}/{number}.jpg" for number in range(pictures)]
    size, context = Collect().block_size, multiprocessing.get_context("spawn")
    shares = context.Queue()
    for share in Share.among(processes, connections):
        shares.put(share)
    with context.Pool(processes, Worker, (shares, str(folder))) as pool:
        return sum(pool.imap_unordered(our_block, [urls[start : start + size] for start in range(0, pictures, size)]))


def theirs(kept: bool, python: str, base: str, pictures: int, processes: int, connections: int, folder: Path) -> int:
    """Run img2dataset, by default or so that what is fetched is `kept`; returns how many pictures are in its Parquet files."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    names = folder / "urls.txt"
    names.write_text("".join(f"{base}/{number}.jpg\n" for number in range(pictures)))
    options = {
        "url_list": str(names), "output_folder": str(folder / "out"), "output_format": "parquet", "input_format": "txt",
        "processes_count": processes, "thread_count": connections // processes, "resize_mode": "no", "encode_quality": 95,
        "number_sample_per_shard": max(1, pictures // (3 * processes)), "incremental_mode": "incremental",
        "extract_exif": False, "compute_hash": "sha256", "skip_reencode": kept, "timeout": 30,
    }  # fmt: skip
    script = folder / "peer.py"
    script.write_text(PEER)
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, str(script), json.dumps(options)], capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    if done.returncode:
        raise RuntimeError(f"img2dataset failed: {done.stderr[-2000:]}")
    tables = [pq.read_table(path, columns=["status"]) for path in sorted((folder / "out").glob("*.parquet"))]
    return sum(table["status"].to_pylist().count("success") for table in tables)


def compare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All sides in alternation; the median of ours beside that of each peer."""
    sides = ["ours", *(options.peer or PEERS)]
    rates: dict[str, list[float]] = {side: [] for side in sides}
    how = (options.pictures, options.processes, options.connections)
    with museum() as (base, size), tempfile.TemporaryDirectory(dir=options.work) as work:
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                where = (base, *how, Path(work, f"{side}-{number}"))
                count = ours(*where) if side == "ours" else theirs(side == "kept", options.peer_python, *where)
                if count != options.pictures:
                    raise RuntimeError(f"{side} stored {count} of {options.pictures} pictures: this run measured something else")
                rates[side].append(rate(base, options.pictures))
                print(f"{side}: {rates[side][-1]:.0f}/s (load {os.getloadavg()[0]:.1f})", flush=True)
    medians = {side: round(statistics.median(found), 1) for side, found in rates.items()}
    hardware = f"{len(os.sched_getaffinity(0))} x {processor()}, Python {platform.python_version()}"
    return {
        side: {
            "claim": f"download and hygiene as the collect job does them, {size / 1000:.0f} KB pictures: pictures/s, at least "
            f"{TARGET} x img2dataset ({'skip_reencode' if side == 'kept' else 'its default, no resizing'})",
            "ours": medians["ours"],
            "peer": medians[side],
            "ratio": round(medians["ours"] / medians[side], 2),
            "hardware": hardware,
        }
        for side in sides[1:]
    }


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--peer-python", required=True, metavar="PYTHON", help="the python of an environment with img2dataset")
    command.add_argument("--peer", choices=PEERS, action="append", help="how img2dataset runs; may be repeated (both)")
    command.add_argument("--pictures", type=int, default=3000)
    command.add_argument("--processes", type=int, default=2)
    command.add_argument("--connections", type=int, default=32, help="to the server at a time, over all processes")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--work", help="a folder for what is stored (a temporary one)")
    options = command.parse_args()
    found = compare(options)
    first = next(iter(found.values()))
    report({**first, "peers": found}, options.record, list(found.values()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
