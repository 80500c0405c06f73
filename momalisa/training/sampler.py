"""Which samples stand in which step: a function of (seed, step), never of rank or worker count."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from momalisa.diffusion import generator


@dataclass(frozen=True)
class Stream:
    """An endless stream of `count` samples: epoch after epoch, each in an order of its own.

    A global batch is a run of the stream, so each sample is seen exactly once an epoch, and an epoch's end may lie
    inside a batch.
    """

    seed: int
    count: int

    def order(self, epoch: int) -> list[int]:
        """The epoch's permutation of 0..count-1."""
        order: list[int] = torch.randperm(self.count, generator=generator(self.seed, "order", epoch)).tolist()
        return order

    def run(self, start: int, length: int) -> list[tuple[int, int]]:
        """(epoch, sample) of the stream's places start..start+length-1."""
        found: list[tuple[int, int]] = []
        epoch = start // self.count
        while len(found) < length:
            at = start + len(found) - epoch * self.count
            found += [(epoch, sample) for sample in self.order(epoch)[at : at + length - len(found)]]
            epoch += 1
        return found


def share(batch: list[tuple[int, int]], rank: int, workers: int) -> list[tuple[int, int]]:
    """A worker's part of a global batch whose length the workers divide."""
    assert len(batch) % workers == 0
    size = len(batch) // workers
    return batch[rank * size : (rank + 1) * size]
