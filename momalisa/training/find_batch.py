"""Which `train.micro_batch` suits this machine: measured, with the configuration's own model, precision and options.

    python -m momalisa.training.find_batch --config configs/sd14-24gb.yaml [--train.compile=true ...]

Tries 1, 2, 4, ... pictures in one pass, up to a worker's share of `train.batch`, until the accelerator's memory is full;
prints images/s and the peak memory of each, and last the setting to use. The latents are noise; nothing is written.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from momalisa.config import Settings, Train, command_line
from momalisa.latents import Autoencoder, load_tokenizer, tokenize
from momalisa.storage import Store
from momalisa.training.cache import LatentCache
from momalisa.training.loop import Events, Run, Trainer
from momalisa.training.metrics import peak_memory_gib

WORTH = 1.03  # a larger batch must be at least this much faster


@dataclass(frozen=True)
class Trial:
    micro_batch: int
    images_per_s: float
    peak_gib: float


def sizes(share: int) -> list[int]:
    """1, 2, 4, ... and a worker's share itself."""
    return sorted({min(2**power, share) for power in range(share.bit_length() + 1)})


def full(error: RuntimeError) -> bool:
    """Whether the accelerator's memory is: PyTorch's own word for it, or what its libraries say that found none left."""
    said = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


def trials(settings: Settings, steps: int = 4) -> Iterator[Trial]:
    """Measure sizes in turn, until one does not fit."""
    chosen = settings.train
    for size in sizes(chosen.share):
        try:
            yield measure(settings, size, steps)
        except RuntimeError as error:
            if not full(error):
                raise
            return
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def measure(settings: Settings, size: int, steps: int) -> Trial:
    """Some steps of one pass of `size` pictures. Raises RuntimeError where they do not fit."""
    alone = {"batch": size, "micro_batch": None, "cell": None, "workers": 1, "min_workers": None, "images": (steps + 2) * size}
    train = Train(**{**settings.train.model_dump(), **alone, "flip": False})  # noise has no mirror image
    with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
        trainer = Trainer(Run("trial", train, settings.diffusion, noise(settings, size), Store(scratch)), Events())
        try:
            for _ in range(2):  # compilation, allocation
                float(trainer.step())
            began = time.monotonic()
            losses = [trainer.step() for _ in range(steps)]
            float(torch.stack(losses).sum())  # waits for the device
            speed = steps * size / (time.monotonic() - began)
        finally:
            trainer.batches.close()
            trainer.writer.close()
        return Trial(size, speed, peak_memory_gib(trainer.device))


def noise(settings: Settings, works: int) -> LatentCache:
    """So many works that are noise, at the configured resolution."""
    autoencoder = Autoencoder.load(settings.diffusion)
    side = settings.encode.resolution_px // autoencoder.factor
    source = torch.Generator().manual_seed(0)
    moments = torch.randn(works, 2 * autoencoder.channels, side, side, generator=source).half()
    names = [f"work-{number}" for number in range(works)]
    return LatentCache(names, names, list(moments), tokenize(load_tokenizer(settings.diffusion), names))


def best(found: list[Trial]) -> Trial:
    """The smallest size that is nearly as fast as any."""
    fastest = max(trial.images_per_s for trial in found)
    return next(trial for trial in found if trial.images_per_s * WORTH >= fastest)


def main() -> None:
    settings, found = command_line(__doc__, "momalisa.training.find_batch"), []
    for trial in trials(settings):
        print(f"micro_batch {trial.micro_batch:4d}  {trial.images_per_s:8.1f} images/s  {trial.peak_gib:6.2f} GiB", flush=True)
        found.append(trial)
    if not found:
        raise SystemExit(
            "not even one picture fits: try train.gradient_checkpointing, train.optimizer=adamw8bit or train.lora_rank"
        )
    print(f"use --train.micro_batch={best(found).micro_batch}")


if __name__ == "__main__":
    main()
