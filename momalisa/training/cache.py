"""The training set in memory: moments, captions and token ids of every encoded work."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from momalisa.dataset import Dataset
from momalisa.records import OK


@dataclass(frozen=True)
class LatentCache:
    """Rows in order of id. 64 KiB a row at 512x512, so 100,000 works are 6.4 GB."""

    ids: list[str]
    captions: list[str]
    moments: Sequence[torch.Tensor]  # N of [2C, H, W] float16: mean, log-variance; H and W differ between buckets
    token_ids: torch.Tensor  # [N, L] int64

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: list[int]) -> LatentCache:
        return LatentCache(
            ids=[self.ids[i] for i in indices],
            captions=[self.captions[i] for i in indices],
            moments=[self.moments[i] for i in indices],
            token_ids=self.token_ids[indices],
        )

    def stacked(self) -> torch.Tensor:
        """The moments of rows of one shape: [N, 2C, H, W] float16."""
        return torch.stack(list(self.moments))

    def buckets(self) -> list[list[int]]:
        """The rows of each shape, in order of shape."""
        found: dict[tuple[int, ...], list[int]] = {}
        for index, moments in enumerate(self.moments):
            found.setdefault(tuple(moments.shape), []).append(index)
        return [found[shape] for shape in sorted(found)]


def load(dataset: Dataset, tables: Sequence[str], left_out: Collection[str] = ()) -> LatentCache:
    """Every good row of some latents tables, but those of `left_out`. Raises ValueError where there is none."""
    again = set(left_out)
    rows = [row for row in dataset.rows(list(tables)) if row["status"] == OK and row["id"] not in again]
    if not rows:
        raise ValueError(f"{dataset.store.root}: no work was encoded without an error; see the encode job's rejected rows")
    rows.sort(key=lambda row: row["id"])
    return LatentCache(
        ids=[row["id"] for row in rows],
        captions=[row["caption"] for row in rows],
        moments=[_moments(row) for row in rows],
        token_ids=torch.tensor([row["token_ids"] for row in rows], dtype=torch.int64),
    )


def _moments(row: dict[str, Any]) -> torch.Tensor:
    values = np.frombuffer(row["moments"], dtype="<f2").copy()  # a tensor must be able to write
    return torch.from_numpy(values).view(2 * row["channels"], row["height"], row["width"])


def split(cache: LatentCache, held_out_fraction: float) -> tuple[LatentCache, LatentCache]:
    """(training, held out): chosen by the hash of the id, so a work never changes sides as a collection grows.

    At least one work is held out and at least one is left to train on. Raises ValueError for fewer than two.
    """
    if len(cache) < 2:
        raise ValueError(f"a collection of {len(cache)} works cannot be split into training and held-out; collect at least 2")
    places = [int(hashlib.sha256(sample_id.encode()).hexdigest()[:8], 16) / 2**32 for sample_id in cache.ids]
    held = [i for i, place in enumerate(places) if place < held_out_fraction]
    if not held:
        held = [places.index(min(places))]
    if len(held) == len(cache):
        held.remove(places.index(max(places)))
    kept = set(held)
    return cache.rows([i for i in range(len(cache)) if i not in kept]), cache.rows(held)
