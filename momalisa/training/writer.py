"""Checkpoints written beside training: the step only waits for a copy in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint
from momalisa.checkpoint.retention import retain
from momalisa.storage import Store
from momalisa.training import state as trainer_state
from momalisa.training.model import Denoiser, of_unet, save_text_adapters


@dataclass(frozen=True)
class Snapshot:
    """Everything of one moment, on the CPU, that nobody writes to any more."""

    checkpoint: Checkpoint  # without its files' hashes
    denoiser: Denoiser  # for its configuration only
    average: dict[str, torch.Tensor]  # name -> EMA weight, as it is published
    state: dict[str, torch.Tensor]
    progress: dict[str, Any]


class Writer:
    """Writes snapshots one after another in a thread. One that cannot be written (a full disk) is reported and passed
    over: the checkpoints before it stand, and training goes on to the next."""

    def __init__(
        self, store: Store, keep_states: int, said: Callable[[Checkpoint], None], keep_weights: int | None = None
    ) -> None:
        """`keep_states`: how many of the newest checkpoints keep what training resumes from; `keep_weights`: how many stay."""
        self.store, self.keep_states, self.keep_weights, self.said = store, keep_states, keep_weights, said
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._waiting: Future[Checkpoint] | None = None
        self.failure: Exception | None = None  # of the last snapshot, if it could not be written

    def submit(self, snapshot: Snapshot) -> None:
        """Begin to write; waits first for the one before, so that two copies are in memory at most."""
        self.settle()
        self._waiting = self._thread.submit(self._write, snapshot)

    def settle(self) -> None:
        """Wait for the snapshot in progress, and say what came of it."""
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        try:
            written = waiting.result()
        except Exception as error:  # each storage has its own; the loss is one checkpoint
            self.failure = error
            print(f"train: a checkpoint could not be written ({type(error).__name__}: {error}); going on", flush=True)
            return
        self.failure = None
        self.said(written)

    def close(self) -> None:
        """Wait, and raise what kept the last snapshot from being written. Raises OSError."""
        self.settle()
        self._thread.shutdown()
        if self.failure is not None:
            raise OSError(
                f"the last checkpoint could not be written: {self.failure}; free space and start again"
            ) from self.failure

    def _write(self, snapshot: Snapshot) -> Checkpoint:
        with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
            weights, state = Path(scratch) / "weights", Path(scratch) / "state"
            checkpoints.save_weights(snapshot.denoiser.unet, weights, of_unet(snapshot.average), lora=snapshot.checkpoint.lora)
            save_text_adapters(weights, snapshot.denoiser.text_encoder, snapshot.average)
            trainer_state.write(state, snapshot.state, snapshot.progress)
            written = checkpoints.write(self.store, snapshot.checkpoint, weights, state)
        retain(self.store, written.run, self.keep_states, self.keep_weights)
        return written
