"""Which samples stand in which step: a function of (seed, place in the stream), never of rank or worker count.

The unit is a cell: `size` samples of one bucket (works of one latent shape, which can share a batch). A global batch is
a run of cells, the same cells however many workers share them.

    bucket b, n works      an endless stream of places: epoch after epoch, each in an order of its own
    cell c of bucket b     its places c * size .. (c + 1) * size - 1: an epoch's remainder is completed from the next
    epoch e of the run     of each bucket the cells from ceil(e n / size) to ceil((e + 1) n / size), all shuffled together
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from momalisa.diffusion import generator

Sample = tuple[int, int]  # (epoch of its bucket, index of the work)


@dataclass(frozen=True)
class Cell:
    bucket: int
    samples: tuple[Sample, ...]


class Cells:
    """An endless sequence of cells over buckets of works; any run of it can be asked for directly."""

    def __init__(self, seed: int, buckets: Sequence[Sequence[int]], size: int) -> None:
        """`buckets`: the indices of the works in each; none may be empty."""
        assert buckets
        assert all(buckets)
        assert size > 0
        self.seed, self.buckets, self.size = seed, [tuple(bucket) for bucket in buckets], size
        self._order = lru_cache(maxsize=2 * len(buckets) + 2)(self._permutation)
        self._plan = lru_cache(maxsize=2)(self._shuffled)

    def run(self, start: int, count: int) -> list[Cell]:
        """Cells start..start+count-1 of the sequence."""
        found: list[Cell] = []
        epoch = self._epoch_of(start)
        while len(found) < count:
            plan, first = self._plan(epoch), self._first(epoch)
            at = start + len(found) - first
            found += [self._cell(bucket, number) for bucket, number in plan[at : at + count - len(found)]]
            epoch += 1
        return found

    def _first(self, epoch: int) -> int:
        """How many cells come before an epoch."""
        return sum(-(-epoch * len(bucket) // self.size) for bucket in self.buckets)

    def _epoch_of(self, cell: int) -> int:
        works = sum(map(len, self.buckets))
        epoch = max(0, cell * self.size // works - len(self.buckets) - 1)
        while self._first(epoch + 1) <= cell:
            epoch += 1
        while self._first(epoch) > cell:
            epoch -= 1
        return epoch

    def _shuffled(self, epoch: int) -> list[tuple[int, int]]:
        """The cells of an epoch, as (bucket, number in its bucket), in the order in which they are trained on."""
        cells = [
            (place, number)
            for place, bucket in enumerate(self.buckets)
            for number in range(-(-epoch * len(bucket) // self.size), -(-(epoch + 1) * len(bucket) // self.size))
        ]
        return [cells[i] for i in torch.randperm(len(cells), generator=generator(self.seed, "cells", epoch)).tolist()]

    def _permutation(self, bucket: int, epoch: int) -> list[int]:
        works = self.buckets[bucket]
        order = torch.randperm(len(works), generator=generator(self.seed, "order", bucket, epoch))
        return [works[i] for i in order.tolist()]

    def _cell(self, bucket: int, number: int) -> Cell:
        count = len(self.buckets[bucket])
        places = range(number * self.size, (number + 1) * self.size)
        samples = tuple((place // count, self._order(bucket, place // count)[place % count]) for place in places)
        return Cell(bucket, samples)


def deal(cells: Sequence[Cell], rank: int, workers: int) -> list[Cell]:
    """A worker's cells of a global batch: as even a share as there is; none where workers outnumber cells."""
    return list(cells[rank::workers])


def passes(cells: Sequence[Cell], most: int | None) -> list[list[Sample]]:
    """The forward passes over some cells: samples of one bucket together, `most` at a time (None: no limit)."""
    ordered = sorted(cells, key=lambda cell: cell.bucket)  # stable
    found: list[list[Sample]] = []
    for _, group in itertools.groupby(ordered, key=lambda cell: cell.bucket):
        samples = [sample for cell in group for sample in cell.samples]
        step = most or len(samples)
        found += [samples[start : start + step] for start in range(0, len(samples), step)]
    return found
