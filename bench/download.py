"""download: pictures a second, ours and img2dataset's, from one server on this machine, on the same cores, in alternation.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install img2dataset==1.47.0
    python bench/download.py --peer-python /tmp/peer/bin/python [--mode checked] [--record]

Both sides fetch the same JPEG files (about 100 KB each) with as many processes and connections, hash them (SHA-256), look
at X-Robots-Tag, and write Parquet. What else they do depends on the mode:

    checked   ours: decodes every byte with Pillow,    peer: decodes with OpenCV, stores what it fetched
              at an eighth of the size, stores what    (skip_reencode)
              it fetched
    stored    ours: reads the header with Pillow       peer: looks at nothing (disable_all_reencoding)
    cleaned   ours: the whole of `collect`'s block:    peer: decodes and encodes again, quality 95, 4:2:0, with
              decodes, judges, encodes again at        OpenCV (its default)
              quality 95, 4:4:4

Ours reads robots.txt and judges every URL by it, resolves and judges addresses, and waits for its turn at a host, whose
caps are set so high that they do not bind. img2dataset does none of these. The rate is taken where it is the same for
both: by the server, from the first request for a picture to the last, so that neither start-up nor imports count. Ray is
not part of it. The last line is one JSON object; --record adds it to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

MODES = ("checked", "stored", "cleaned")
DIFFERENT = 64  # pictures; the server gives them many names
TARGET = 1.5
BLOCK = 64
HEADER = "# Results\n\nFigures per second, ours and the peer's in the same run.\n\n"
TITLES = "| date | claim | ours | peer | ratio | hardware |\n|---|---|---|---|---|---|\n"
RESULTS = Path(__file__).with_name("RESULTS.md")
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


def our_worker(mode: str, urls: list[str], root: str, connections: int, index: int, of: int) -> int:
    """What one of our processes does; returns how many pictures it stored."""
    from momalisa.collect.block import store_block
    from momalisa.collect.downloader import Downloader
    from momalisa.collect.fetched import Fetched
    from momalisa.collect.hosts import Hosts
    from momalisa.collect.pace import Share
    from momalisa.config import Collect
    from momalisa.dataset import Dataset
    from momalisa.records import IMAGES, OK, Artwork

    settings = Collect(allow_private_addresses=True, requests_per_second=1e6)
    share, hosts, stored = Share(connections, index, of), Hosts(), 0
    for start in range(0, len(urls), BLOCK):
        works = [Artwork(f"{index}-{start + place}", "", image_url=url) for place, url in enumerate(urls[start : start + BLOCK])]
        if mode == "cleaned":
            block = store_block(root, works, settings, share, hosts, {})
            hosts, stored = block.figures.hosts, stored + block.figures.ok
            continue
        rows: list[dict[str, Any]] = []

        def keep(place: int, fetched: Fetched, works: list[Artwork] = works, rows: list[dict[str, Any]] = rows) -> None:
            width, height = picture_size(fetched.data, decode=mode == "checked")
            sha256 = hashlib.sha256(fetched.data).hexdigest()
            facts = {"status": OK, "reason": "ok", "bytes": fetched.data, "sha256": sha256, "width": width, "height": height}
            rows.append({**works[place].row(), **facts})

        downloader = Downloader(settings, share, hosts)
        asyncio.run(downloader.fetch_all([work.image_url for work in works], keep))
        Dataset(root).put_rows("images", rows, IMAGES)
        hosts, stored = downloader.hosts, stored + len(rows)
    return stored


def picture_size(data: bytes, decode: bool) -> tuple[int, int]:
    """Raises an error of Pillow's for what is no picture."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        size = image.size
        if decode:
            image.draft(None, (1, 1))  # all of its bits are read, an eighth of its pixels made
            image.load()
        return size


def ours(mode: str, base: str, pictures: int, processes: int, connections: int, folder: Path) -> int:
    """Run our side; returns how many pictures are in its Parquet files."""
    urls = [f"{base}/{number}.jpg" for number in range(pictures)]
    share = connections // processes
    jobs = [(mode, urls[index::processes], str(folder), share, index, processes) for index in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return sum(pool.starmap(our_worker, jobs))


def theirs(mode: str, base: str, pictures: int, processes: int, connections: int, folder: Path, python: str) -> int:
    """Run img2dataset; returns how many pictures are in its Parquet files."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    names = folder / "urls.txt"
    names.write_text("".join(f"{base}/{number}.jpg\n" for number in range(pictures)))
    options = {
        "url_list": str(names), "output_folder": str(folder / "out"), "output_format": "parquet", "input_format": "txt",
        "processes_count": processes, "thread_count": connections // processes, "resize_mode": "no", "encode_quality": 95,
        "number_sample_per_shard": max(1, pictures // (3 * processes)), "incremental_mode": "incremental",
        "extract_exif": False, "compute_hash": "sha256", "disable_all_reencoding": mode == "stored",
        "skip_reencode": mode == "checked", "timeout": 30,
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


def compare(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """One mode, both sides in alternation; the median of each."""
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    how = (options.pictures, options.processes, options.connections)
    with museum() as (base, size), tempfile.TemporaryDirectory(dir=options.work) as work:
        for number in range(options.rounds):
            for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
                folder = Path(work, f"{side}-{number}")
                count = (
                    ours(mode, base, *how, folder) if side == "ours" else theirs(mode, base, *how, folder, options.peer_python)
                )
                if count != options.pictures:
                    raise RuntimeError(f"{side} stored {count} of {options.pictures} pictures: this run measured something else")
                rates[side].append(rate(base, options.pictures))
                print(f"{mode} {side}: {rates[side][-1]:.0f}/s (load {os.getloadavg()[0]:.1f})", flush=True)
    medians = {side: round(statistics.median(found), 1) for side, found in rates.items()}
    return {**medians, "ratio": round(medians["ours"] / medians["peer"], 2), "picture_kb": round(size / 1000), "rates": rates}


def hardware() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{len(os.sched_getaffinity(0))} x {names[0] if names else platform.processor()}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, metavar="PYTHON", help="the python of an environment with img2dataset")
    parser.add_argument("--mode", choices=MODES, action="append", help="what is done to a picture; may be repeated (all)")
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--connections", type=int, default=32, help="to the server at a time, over all processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help="a folder for what is stored (a temporary one)")
    parser.add_argument("--record", action="store_true", help="add a dated row to bench/RESULTS.md")
    options = parser.parse_args()
    found = {mode: compare(mode, options) for mode in options.mode or MODES}
    first = next(iter(found))
    result = {
        "claim": f"download: at least {TARGET} x img2dataset's pictures/s on the same cores ({first})",
        "ours": found[first]["ours"],
        "peer": found[first]["peer"],
        "ratio": found[first]["ratio"],
        "hardware": hardware(),
        "modes": {mode: {key: value for key, value in one.items() if key != "rates"} for mode, one in found.items()},
    }
    if options.record:
        record(result)
    print(json.dumps(result))


def record(result: dict[str, Any]) -> None:
    """Add a row for each mode to the table of results."""
    if not RESULTS.exists():
        RESULTS.write_text(HEADER + TITLES, encoding="utf-8")
    with open(RESULTS, "a", encoding="utf-8") as file:
        for mode, one in result["modes"].items():
            claim = f"download, {mode}: pictures/s, at least {TARGET} x img2dataset"
            cells = (f"{datetime.now(UTC):%Y-%m-%d}", claim, one["ours"], one["peer"], one["ratio"], result["hardware"])
            file.write(f"| {' | '.join(map(str, cells))} |\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
