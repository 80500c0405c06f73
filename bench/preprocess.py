"""preprocess: pictures a second from JPEG bytes to BLIP's pixel tensor, ours against BlipImageProcessorPil, one thread each.

    python bench/preprocess.py [--pictures ../shared/data/artworks] [--record]

Pictures are scaled to a long side of 1024 px and stored as `collect` stores them, which is what the caption job reads;
without a folder of real ones they are drawn. `--as-they-are` takes a folder's JPEG files unchanged. Both sides get the
same bytes in turns; what counts is the thread's processor time, of each picture the least of several rounds, so that a
busy machine slows neither side.
The last line of the output is one JSON object; `--record` appends it to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BlipImageProcessorPil

from momalisa.collect.hygiene import clean
from momalisa.config import Collect
from momalisa.pixels import BlipPixels

CLAIM = "BLIP preprocessing, pictures/s on one thread, is at least 2.5 times BlipImageProcessorPil's"
RESULTS = Path(__file__).with_name("RESULTS.md")
LEVEL = 1 / 255 / 0.2613  # one of 255, on the scale of normalised values
SIDE_PX = 1024


def drawn(count: int) -> list[bytes]:
    """Pictures with soft shapes and grain, JPEG."""
    pictures = []
    for number in range(count):
        rng = np.random.default_rng(number)
        size = ((1600, 1200), (1200, 1600), (1500, 1500))[number % 3]
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        values = np.asarray(coarse).astype(np.int16) + rng.integers(-10, 11, (size[1], size[0], 1))
        sink = io.BytesIO()
        Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=92)
        pictures.append(sink.getvalue())
    return pictures


def pictures(folder: Path | None, count: int, as_they_are: bool) -> list[bytes]:
    """The bench's JPEG files. Raises ValueError for a folder without any."""
    if folder is None:
        found = drawn(count)
    else:
        files = sorted(folder.glob("*.jpg"))
        if not files:
            raise ValueError(f"{folder} holds no .jpg files")
        found = [file.read_bytes() for file in files[:: max(1, len(files) // count)]][:count]
    return found if as_they_are else [clean(data, Collect(max_side_px=SIDE_PX)).bytes for data in found]


def quickest(sides: Sequence[Callable[[bytes], Any]], data: Sequence[bytes], rounds: int) -> list[float]:
    """Pictures a second of each side's processor time: over pictures, the least of several rounds, sides in turns."""
    best = np.full((len(sides), len(data)), np.inf)
    for _ in range(rounds):
        for number, picture in enumerate(data):
            for side, function in enumerate(sides):
                began = time.thread_time()
                function(picture)
                best[side, number] = min(best[side, number], time.thread_time() - began)
    return [len(data) / float(seconds) for seconds in best.sum(1)]


def measure(data: Sequence[bytes], rounds: int) -> dict[str, Any]:
    """The bench's result."""
    torch.set_num_threads(1)
    processor = BlipImageProcessorPil()
    ours, exact, batch = BlipPixels.of(processor), BlipPixels.of(processor, exact=True), torch.empty(3, 384, 384)

    def peer(picture: bytes) -> torch.Tensor:
        shown = Image.open(io.BytesIO(picture))
        pixels: torch.Tensor = processor(images=shown.convert("RGB"), return_tensors="pt").pixel_values[0]
        return pixels

    sides = (lambda picture: ours(picture, batch), lambda picture: exact(picture, batch), peer)
    speeds = quickest(sides, data, rounds)
    shown = [peer(picture) for picture in data]
    off = [
        float((made(picture) - seen).abs().mean()) / LEVEL
        for made in (ours, exact)
        for picture, seen in zip(data, shown, strict=True)
    ]
    return {
        "claim": CLAIM,
        "ours": round(speeds[0], 1),
        "peer": round(speeds[2], 1),
        "ratio": round(speeds[0] / speeds[2], 2),
        "hardware": hardware(),
        "pictures": len(data),
        "full_decode": round(speeds[1], 1),
        "full_decode_ratio": round(speeds[1] / speeds[2], 2),
        "mean_levels_off": round(float(np.mean(off[: len(data)])), 2),
        "full_decode_mean_levels_off": round(float(np.mean(off[len(data) :])), 2),
    }


def hardware() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, 1 thread"


def record(result: dict[str, Any], path: Path = RESULTS) -> None:
    """Append a row."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    cells = [
        today,
        f"preprocess, {result['of']}",
        result["claim"],
        result["ours"],
        result["peer"],
        result["ratio"],
        result["hardware"],
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("| " + " | ".join(map(str, cells)) + " |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="a folder of JPEG files; drawn ones without it")
    parser.add_argument("--as-they-are", action="store_true", help="do not clean the folder's files first")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append the result to bench/RESULTS.md")
    options = parser.parse_args()
    result = measure(pictures(options.pictures, options.count, options.as_they_are), options.rounds)
    kind = "drawn" if options.pictures is None else "real, as they are" if options.as_they_are else "real"
    result["of"] = f"{result['pictures']} {kind} pictures"
    if options.record:
        record(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
