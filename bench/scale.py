"""Ten times the works: is peak memory flat, and time linear? Collect, caption and encode over a folder of tiny pictures.

    python bench/scale.py                           # 2,000 and 20,000 works
    python bench/scale.py --works 20000 --record    # 20,000 and 200,000

The jobs run as programs on a Ray of their own. Memory is the proportional share (PSS) of everything that a job started,
Ray's own processes among them, sampled once a second; `held_mib` says what held it at its peak. `driver_mib` is the most
that the driver ever held, by the kernel's count, which no sample can miss (its resident set, or that of a process of Ray's
that it waited for, whichever is larger). The models are the real classes with tiny random weights, so that the machinery is
measured and not the models.

The last line printed is one JSON object. `ratio` is that of the stage whose memory grows most: `ours` is its peak with ten
times the works, `peer` with as many as given, in MiB. `growth` has every stage: `memory`, the ratio of its peaks; `seconds`,
its time over ten times that of a tenth of the works (1 is linear; less, for starting takes its time too); `driver_bytes`,
by how much each work more made the driver grow. `--record` appends a row for memory and one for time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from results import parser, processor, report

HERE = Path(__file__).resolve()
HOME = HERE.parents[1]
STAGES = ("collect", "caption", "encode")
SIDE_PX = 32


def make_pictures(folder: Path, count: int) -> None:
    """Small PNG files of noise, no two alike, a thousand to a folder."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(1929)
    for number in range(count):
        place = folder / f"{number // 1000:04d}"
        if number % 1000 == 0:
            place.mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8)).save(place / f"{number}.png")


def make_models(folder: Path) -> list[str]:
    """Tiny BLIP and Stable Diffusion folders; returns the settings that name them."""
    from tests import tiny

    tiny.save_blip(folder / "blip")
    tiny.save_diffusion(folder / "diffusion")
    return [f"--caption.model={folder / 'blip'}", f"--diffusion.model={folder / 'diffusion'}"]


class Watch(threading.Thread):
    """Samples the memory of a process and all that descends from it: `peak_mib`, and by what was `held` then."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak_mib, self.over = psutil.Process(pid), 0.0, threading.Event()
        self.held: dict[str, int] = {}

    def run(self) -> None:
        while not self.over.wait(1.0):
            held: dict[str, float] = {}
            try:
                family = [self.root, *self.root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for member in family:
                for key, size in self.shares(member).items():
                    held[key] = held.get(key, 0.0) + size
            if sum(held.values()) > self.peak_mib:
                self.peak_mib, self.held = sum(held.values()), {key: round(size) for key, size in sorted(held.items())}

    def shares(self, member: psutil.Process) -> dict[str, float]:
        """MiB that a process holds for itself, and its share of mapped files and of shared memory (Ray's object store)."""
        try:
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
            title = member.cmdline()[0]
        except (psutil.Error, OSError, IndexError):
            return {}
        name = "driver" if member == self.root else "workers" if title.startswith("ray::") else "ray itself"
        kinds = {"Pss_Anon:": name, "Pss_File:": "files", "Pss_Shmem:": "object store"}
        return {kinds[kind]: int(size) / 1024 for kind, size, *_ in map(str.split, lines) if kind in kinds}


def run(stage: str, root: Path, pictures: Path, more: list[str], log: Path) -> dict[str, Any]:
    """One stage as a program; its seconds and its peak memory in MiB, all its processes' and its driver's."""
    where = [f"--root={root}", "--collect.source.kind=folder", f"--collect.source.location={pictures}"]
    fixed = ["--collect.block_size=256", "--caption.max_new_tokens=2", "--encode.resolution_px=32", "--caption.batch=64"]
    rates = ["--encode.batch=64", "--caption.max_bad_fraction=1"]
    config = str(HOME / "configs" / "demo.yaml")
    command = [sys.executable, "-m", f"ray_jobs.{stage}", "--config", config, *where, *fixed, *rates, *more]
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    environment.pop("RAY_ADDRESS", None)
    began = time.monotonic()
    with open(log, "ab") as file:
        process = subprocess.Popen(command, cwd=HOME, env=environment, stdout=file, stderr=file)
        watch = Watch(process.pid)
        watch.start()
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watch.over.set()
    if process.returncode:
        raise SystemExit(f"{stage} failed; the end of its log:\n{log.read_text()[-3000:]}")
    peaks = {"peak_mib": round(watch.peak_mib), "driver_mib": round(used.ru_maxrss / 1024, 1), "held_mib": watch.held}
    return {"seconds": round(time.monotonic() - began, 1), **peaks}


def growth(small: dict[str, Any], large: dict[str, Any], works: int) -> dict[str, float]:
    """How one stage's figures for ten times the `works` compare with those for them."""
    return {
        "memory": round(large["peak_mib"] / small["peak_mib"], 3),
        "seconds": round(large["seconds"] / (10 * small["seconds"]), 2),
        "driver_bytes": round((large["driver_mib"] - small["driver_mib"]) * 2**20 / (9 * works)),
    }


def measure(works: int) -> dict[str, Any]:
    found: dict[str, Any] = {stage: {} for stage in STAGES}
    with tempfile.TemporaryDirectory(prefix="momalisa-scale-") as scratch:
        folder = Path(scratch)
        models = make_models(folder)
        for count in (works, 10 * works):
            make_pictures(folder / f"pictures-{count}", count)
            for stage in STAGES:
                figures = run(stage, folder / f"out-{count}", folder / f"pictures-{count}", models, folder / "log")
                found[stage][count] = figures | {"works_per_s": round(count / figures["seconds"], 1)}
                print(f"{stage}, {count} works: {figures}", file=sys.stderr, flush=True)
    return summary(found, works)


def summary(found: dict[str, Any], works: int) -> dict[str, Any]:
    """The claim about memory, that about `time`, and each stage's figures."""
    grown = {stage: growth(found[stage][works], found[stage][10 * works], works) for stage in STAGES}
    most, slowest = (max(STAGES, key=lambda stage: grown[stage][name]) for name in ("memory", "seconds"))
    told = {name: ", ".join(f"{stage} {grown[stage][name]}" for stage in STAGES) for name in ("memory", "seconds")}
    smaller, larger, hardware = f"{works:,}", f"{10 * works:,}", f"{os.cpu_count()} x {processor()}"
    small, large = found[slowest][works]["seconds"], found[slowest][10 * works]["seconds"]
    return {
        "claim": f"peak memory of {most}, which grows most, MiB: {larger} works against {smaller} (flat within 10%); "
        f"{told['memory']}",
        "ours": found[most][10 * works]["peak_mib"],
        "peer": found[most][works]["peak_mib"],
        "ratio": grown[most]["memory"],
        "hardware": hardware,
        "time": {
            "claim": f"seconds of {slowest}, which slows most: {larger} works against ten times those of {smaller} "
            f"(linear: 1 at most); {told['seconds']}",
            "ours": large,
            "peer": round(10 * small, 1),
            "ratio": grown[slowest]["seconds"],
            "hardware": hardware,
        },
        "growth": grown,
        "stages": found,
    }


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--works", type=int, default=2000, help="the smaller number; the larger one is ten times as many")
    options = command.parse_args()
    figures = measure(options.works)
    report(figures, options.record, [figures, figures["time"]])


if __name__ == "__main__":
    sys.path.insert(0, str(HOME))
    main()
