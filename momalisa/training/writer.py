"""Checkpoints written beside training: the step only waits for a copy in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint, averages
from momalisa.checkpoint.retention import retain
from momalisa.config import Train
from momalisa.storage import Store
from momalisa.training import state as trainer_state
from momalisa.training.model import Denoiser, save_trained


@dataclass(frozen=True)
class Snapshot:
    """Everything of one moment, on the CPU, that nobody writes to until it is written out."""

    checkpoint: Checkpoint  # without its files' hashes
    denoiser: Denoiser  # for its configuration only
    average: dict[str, torch.Tensor]  # name -> EMA weight, as it is published
    state: dict[str, torch.Tensor]
    progress: dict[str, Any]
    powers: dict[float, dict[str, torch.Tensor]] = field(default_factory=dict)  # power-function averages, by their length


class Writer:
    """Writes snapshots one after another in a thread. One that cannot be written (a full disk) is reported and passed
    over: the checkpoints before it stand, and training goes on to the next."""

    def __init__(self, store: Store, settings: Train, said: Callable[[Checkpoint], None]) -> None:
        self.store, self.settings, self.said = store, settings, said
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._waiting: Future[Checkpoint] | None = None
        self.failure = ""  # what kept the last snapshot from being written
        self.written: int | None = None  # how many images the last one that was written had seen

    def submit(self, snapshot: Snapshot) -> None:
        """Begin to write; waits first for the one before."""
        self.settle()
        self._waiting = self._thread.submit(self._write, snapshot)

    def settle(self) -> None:
        """Wait for the snapshot in progress, and say what came of it."""
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        error = waiting.exception()  # each storage has its own; the loss is one checkpoint
        self.failure = f"{type(error).__name__}: {error}" if error is not None else ""
        if self.failure:
            print(f"train: a checkpoint could not be written ({self.failure}); going on", flush=True)
            return
        written = waiting.result()
        self.written = written.images_seen
        self.said(written)

    def close(self) -> None:
        """Wait, and raise what kept the last snapshot from being written. Raises OSError."""
        self.settle()
        self._thread.shutdown()
        if self.failure:
            raise OSError(f"the last checkpoint could not be written: {self.failure}; free space and start again")

    def _write(self, snapshot: Snapshot) -> Checkpoint:
        with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
            weights, state = Path(scratch) / "weights", Path(scratch) / "state"
            save_trained(weights, snapshot.denoiser, snapshot.average)
            trainer_state.write(state, snapshot.state, snapshot.progress)
            if snapshot.powers:
                averages.write(self.store, snapshot.checkpoint.path, snapshot.powers)
            written = checkpoints.write(self.store, snapshot.checkpoint, weights, state)
        try:
            retain(self.store, written.run, self.settings.keep_states, self.settings.keep_weights)
            averages.retain(self.store, written.run, self.settings.keep_averages)
        except Exception as error:  # the checkpoint is whole; what is too much goes with the next one
            print(f"train: older checkpoints could not be deleted ({type(error).__name__}: {error}); going on", flush=True)
        return written
