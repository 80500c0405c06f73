"""What the workers of a run draw in each step, noted as they do it; and workers that wait where a test wants them to."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Drawn = tuple[int, str]  # (epoch of its bucket, id of the work): with the seed all that a sample's chance is a function of


def train_worker(config: dict[str, Any]) -> None:
    """`ray_jobs.train.train_worker` under audit. To be put in its place in a test's process, which sends it to the workers."""
    from ray_jobs import train

    with noted(Path(config["settings"].root)):
        train.train_worker(config)


@contextmanager
def noted(root: Path) -> Iterator[None]:
    """Inside, the batches of this process are noted in `<root>/audit/`, a line for each step, and wait as `hold` says."""
    from momalisa.training import batches
    from momalisa.training.batches import Batches, Pass

    folder, drawn = root / "audit", list[Drawn]()
    folder.mkdir(parents=True, exist_ok=True)
    at, draws = Batches.at, batches.draws

    def noted_draws(seed: int, samples: list[Drawn], *others: Any) -> Any:
        drawn.extend(samples)
        return draws(seed, samples, *others)

    def noted_at(self: Batches, images_seen: int) -> list[Pass]:
        while held(root, self.workers, images_seen):
            time.sleep(0.1)
        drawn.clear()
        parts = at(self, images_seen)
        counts = any(part.weights.any() for part in parts)
        line = {"images_seen": images_seen, "rank": self.rank, "workers": self.workers, "samples": drawn if counts else []}
        print(json.dumps(line | {"at": time.monotonic_ns()}), file=file, flush=True)
        return parts

    with open(folder / f"{time.monotonic_ns()}-{os.getpid()}.jsonl", "a") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "draws", noted_draws)
        patch.setattr(Batches, "at", noted_at)
        yield


def steps(root: Path) -> dict[int, list[Drawn]]:
    """The samples of each global batch, by the images seen before it, as it was trained on last."""
    lines = [json.loads(line) for path in (root / "audit").glob("*.jsonl") for line in path.read_text().splitlines()]
    newest: dict[int, dict[int, Any]] = {}
    for line in sorted(lines, key=lambda line: int(line["at"])):
        newest.setdefault(line["images_seen"], {})[line["rank"]] = line
    found: dict[int, list[Drawn]] = {}
    for images_seen, ranks in sorted(newest.items()):
        group = [ranks[rank] for rank in range(ranks[0]["workers"])]
        assert {line["workers"] for line in group} == {len(group)}, group
        found[images_seen] = sorted((epoch, work) for line in group for epoch, work in line["samples"])
    return found


def check_epochs(found: dict[int, list[Drawn]], works: int) -> None:
    """Every one of so many works stands exactly once in each epoch that is over, and no sample stands there twice."""
    times = Counter(sample for batch in found.values() for sample in batch)
    assert set(times.values()) == {1}
    over = times.total() // works - 1  # the last is cut off where the run ends
    ids = {work for _, work in times}
    assert len(ids) == works
    assert over > 0
    assert {(epoch, work) for epoch, work in times if epoch < over} == {(epoch, work) for epoch in range(over) for work in ids}


def hold(root: Path, limits: dict[int, int]) -> None:
    """From now on a group of so many workers begins no step after so many images; others go on."""
    folder = root / "audit"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "new").write_text(json.dumps(limits))
    (folder / "new").rename(folder / "limits.json")


def held(root: Path, workers: int, images_seen: int) -> bool:
    path = root / "audit" / "limits.json"
    return path.exists() and images_seen >= json.loads(path.read_text()).get(str(workers), math.inf)
