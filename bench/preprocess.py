"""preprocess: pictures a second from JPEG bytes to BLIP's pixels, ours against BlipImageProcessorPil, one thread each.

    python bench/preprocess.py [--pictures ../shared/data/artworks] [--record]

Ours is what the caption job does: decode, squeeze to a square (`momalisa.square`), normalise. (In the job the first two
are done by tasks on CPUs, the third by the model's process.) Both sides get the same bytes, as `collect` stores them, in two
kinds:

    kept       1024x768, 4:2:0, about 115 KB: the usual file of a museum, whose coded pixels collect keeps
    encoded    pictures of more than 1024 px, which collect scales and encodes at quality 95, 4:4:4; without a folder of
               real ones they are drawn. Decoding alone, which both sides share, is nearly half of the peer's time here: that
               bounds the ratio.

What counts is the thread's processor time, of each picture the least of several rounds, so that a busy machine slows
neither side. In a round a side takes all pictures in a row, as a job does: picture by picture each would begin with what the
other left in the caches. `bound` is the ratio if nothing were done but decoding. The last line is one JSON object.
"""

from __future__ import annotations

import io
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results import parser, processor, report
from transformers import BlipImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))
from momalisa.captioner.florence import square_of
from momalisa.collect.hygiene import clean
from momalisa.config import Collect

SIZES = {"kept": (1024, 768), "encoded": (1600, 1200)}
QUALITY = {"kept": 82, "encoded": 92}


def drawn(kind: str, count: int) -> list[bytes]:
    """Pictures with soft shapes and grain, JPEG."""
    pictures = []
    for number in range(count):
        rng = np.random.default_rng(number)
        width, height = SIZES[kind]
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        values = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 4.5, (height, width, 1))
        sink = io.BytesIO()
        Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=QUALITY[kind])
        pictures.append(sink.getvalue())
    return pictures


def real(folder: Path, count: int) -> list[bytes]:
    """A folder's larger JPEG files. Raises ValueError where there is none."""
    found = []
    for file in sorted(folder.glob("*.jpg")):
        with Image.open(file) as picture:
            if max(picture.size) > Collect().max_side_px:
                found.append(file.read_bytes())
    if not found:
        raise ValueError(f"{folder} holds no .jpg file of more than {Collect().max_side_px} px")
    return found[:: max(1, len(found) // count)][:count]


def quickest(sides: Sequence[Callable[[bytes], Any]], data: Sequence[bytes], rounds: int) -> list[float]:
    """Pictures a second of each side's processor time: over pictures, the least of several rounds."""
    best = np.full((len(sides), len(data)), np.inf)
    for _ in range(rounds):
        for side, function in enumerate(sides):
            for number, picture in enumerate(data):
                began = time.thread_time()
                function(picture)
                best[side, number] = min(best[side, number], time.thread_time() - began)
    return [len(data) / float(seconds) for seconds in best.sum(1)]


def measure(kind: str, of: str, files: Sequence[bytes], rounds: int) -> dict[str, Any]:
    """One kind of pictures, as collect stores them."""
    torch.set_num_threads(1)
    data = [clean(file, Collect()).bytes for file in files]
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
    theirs = BlipImageProcessorPil()
    square, place = square_of(theirs), torch.empty(3, 384, 384)
    std = torch.tensor(theirs.image_std)[:, None, None]
    scale, shift = 1 / 255 / std, -torch.tensor(theirs.image_mean)[:, None, None] / std

    def decoded(picture: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(picture))
        image.load()
        return image

    def ours(picture: bytes) -> torch.Tensor:
        pixels = torch.from_numpy(square(decoded(picture))).permute(2, 0, 1)
        return torch.mul(pixels, scale, out=place).add_(shift)

    def peer(picture: bytes) -> torch.Tensor:
        pixels: torch.Tensor = theirs(images=decoded(picture).convert("RGB"), return_tensors="pt").pixel_values[0]
        return pixels

    speeds = quickest((ours, peer, decoded), data, rounds)
    off = max(float((ours(picture) - peer(picture)).abs().max() / scale.max()) for picture in data)
    size_kb = sum(map(len, data)) / len(data) / 1000
    return {
        "claim": f"BLIP preprocessing, {len(data)} {of} pictures of {size_kb:.0f} KB ({kind}): pictures/s on one thread, at "
        f"least 2.5 x BlipImageProcessorPil; decoding alone would be {speeds[2] / speeds[1]:.2f} x",
        "ours": round(speeds[0], 1),
        "peer": round(speeds[1], 1),
        "ratio": round(speeds[0] / speeds[1], 2),
        "hardware": f"{processor()}, torch {torch.__version__}, 1 thread",
        "bound": round(speeds[2] / speeds[1], 2),
        "levels_off_at_most": round(off, 2),
    }


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--pictures", type=Path, help="a folder of JPEG files for the second kind; drawn ones without it")
    command.add_argument("--count", type=int, default=24)
    command.add_argument("--rounds", type=int, default=5)
    options = command.parse_args()
    large = real(options.pictures, options.count) if options.pictures else drawn("encoded", options.count)
    found = {
        "kept": measure("kept", "drawn", drawn("kept", options.count), options.rounds),
        "encoded": measure("encoded", "real" if options.pictures else "drawn", large, options.rounds),
    }
    report({**found["kept"], "kinds": found}, options.record, list(found.values()))


if __name__ == "__main__":
    main()
