"""The training loop: cached moments in, checkpoints out. One process of one or many; the shell brings the group.

Everything random is a function of (seed, epoch, sample id) (see `sampler` and `momalisa.diffusion.draws`), so the
samples, their noise and the mean loss of a step are the same at any number of workers.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint
from momalisa.config import Diffusion, Train
from momalisa.diffusion import Schedule, draws, loss_per_sample
from momalisa.latents import Autoencoder, TextEncoder, sample
from momalisa.storage import Store
from momalisa.training import state as trainer_state
from momalisa.training.cache import LatentCache
from momalisa.training.ema import Ema
from momalisa.training.sampler import Stream, share
from momalisa.training.state import Progress

LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and where it is written."""

    name: str  # with a hash of everything that decides the result
    train: Train
    diffusion: Diffusion
    cache: LatentCache  # the training half
    store: Store
    provenance: dict[str, Any] = field(default_factory=dict)  # dataset manifest and the like, for the checkpoints


@dataclass
class Events:
    """What the shell wants to hear: called on the main process only, but for `synchronise`, called on all."""

    logged: Callable[[dict[str, float]], None] = lambda metrics: None
    checkpointed: Callable[[Checkpoint], None] = lambda checkpoint: None
    pictures_due: Callable[[int, torch.nn.Module], None] = lambda images_seen, unet: None
    synchronise: Callable[[dict[str, float]], None] = lambda metrics: None


class Trainer:
    """Fine-tunes a UNet on cached latents. `train()` runs to `settings.images`, from the last checkpoint if any."""

    def __init__(self, run: Run, events: Events, workers: int = 1) -> None:
        self.run, self.events, settings = run, events, run.train
        self.accelerator = accelerator(settings, workers)
        self.device = self.accelerator.device
        unet = checkpoints.load_base_unet(run.diffusion)
        self.trained = trainable(unet, settings)
        self.ema = Ema(((name, value) for name, value in unet.named_parameters() if value.requires_grad), settings.ema_decay)
        optimizer = torch.optim.AdamW(self.trained.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.text_encoder = TextEncoder.load(run.diffusion, self.device)
        self.schedule = Schedule.load(run.diffusion)
        self.scaling_factor = Autoencoder.load(run.diffusion).scaling_factor
        self.stream = Stream(settings.seed, len(run.cache))
        self.empty_ids = self.text_encoder.tokenize([""])[0]
        self.unet, self.optimizer = self.accelerator.prepare(unet.train(), optimizer)
        self.bare_unet = self.accelerator.unwrap_model(self.unet)
        self.ema.to(self.device)
        self.progress = self._resume()

    def _resume(self) -> Progress:
        """Restore the newest checkpoint whose trainer state is whole."""
        for saved in reversed(checkpoints.read_all(self.run.store, self.run.name)):
            if not saved.state:
                continue
            with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
                folder = self.run.store.download(f"{saved.path}/state", saved.state, Path(scratch))
                return trainer_state.restore(folder, self.trained, self.ema, self._bare_optimizer)
        return Progress()

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        bare: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return bare

    def train(self) -> Progress:
        """Run to the end. Raises FloatingPointError at a loss that is not a number; the last checkpoint stands."""
        settings, progress = self.run.train, self.progress
        recent, began, first = [], time.monotonic(), progress.images_seen
        while progress.images_seen < settings.images:
            recent.append(self.step())
            ends = progress.images_seen >= settings.images
            if progress.step % LOG_EVERY == 0 or ends or self._checkpoint_due():
                loss = self._mean(recent)
                recent.clear()
                progress.losses.append((progress.images_seen, loss))
                if self.accelerator.is_main_process:
                    rate = (progress.images_seen - first) / (time.monotonic() - began)
                    self.events.logged(
                        {"loss": loss, "images_seen": progress.images_seen, "images_per_s": rate, "learning_rate": self._rate()}
                    )
            self._milestones(ends)
        return progress

    def _mean(self, losses: list[torch.Tensor]) -> float:
        mean = float(self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} near {self.progress.images_seen} images; the last checkpoint is whole. "
                "Try a lower train.learning_rate, or train.precision=bf16"
            )
        return mean

    def _milestones(self, ends: bool) -> None:
        """After a step: pictures of the evaluation prompts and a checkpoint, where they are due."""
        settings, progress = self.run.train, self.progress
        if self.accelerator.is_main_process and (progress.step % settings.evaluate_every_steps == 0 or ends):
            with self.ema.applied():
                self.events.pictures_due(progress.images_seen, self.bare_unet.eval())
            self.bare_unet.train()
        if ends or self._checkpoint_due():
            if self.accelerator.is_main_process:
                self.events.checkpointed(self.save())
            self.events.synchronise({"loss": progress.losses[-1][1], "images_seen": progress.images_seen})

    def _checkpoint_due(self) -> bool:
        """Whether the last step crossed a multiple of `checkpoint_every_images`; its loss is looked at first."""
        settings, seen = self.run.train, self.progress.images_seen
        return seen // settings.checkpoint_every_images > (seen - settings.batch) // settings.checkpoint_every_images

    def step(self) -> torch.Tensor:
        """One optimizer step over one global batch; returns this worker's mean loss, a scalar on the device."""
        settings, progress = self.run.train, self.progress
        for group in self._bare_optimizer.param_groups:
            group["lr"] = self._rate()
        batch = self.stream.run(progress.images_seen, settings.batch)
        mine = share(batch, self.accelerator.process_index, self.accelerator.num_processes)
        micro = len(mine) // settings.accumulation
        total = torch.zeros((), device=self.device)
        for start in range(0, len(mine), micro):
            last = start + micro == len(mine)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.unet):
                loss = self.loss(mine[start : start + micro])
                self.accelerator.backward(loss / settings.accumulation)
            total += loss.detach() / settings.accumulation
        self.accelerator.clip_grad_norm_(self.trained.values(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        progress.images_seen += settings.batch
        progress.step += 1
        return total

    def loss(self, samples: list[tuple[int, int]]) -> torch.Tensor:
        """The weighted loss of samples (epoch, index), a scalar."""
        rows = self.run.cache.rows([index for _, index in samples])
        keys = [(epoch, sample_id) for (epoch, _), sample_id in zip(samples, rows.ids, strict=True)]
        channels, height, width = rows.moments.shape[1] // 2, *rows.moments.shape[2:]
        drawn = draws(self.run.train.seed, keys, (channels, height, width), len(self.schedule), self.run.train.caption_dropout)
        latents = sample(rows.moments, drawn.latent_noise, self.scaling_factor)
        noisy = self.schedule.add_noise(latents, drawn.noise, drawn.timesteps)
        token_ids = torch.where(drawn.dropped[:, None], self.empty_ids, rows.token_ids)
        text = self.text_encoder.embed(token_ids.to(self.device))
        predicted = self.unet(noisy.to(self.device), drawn.timesteps.to(self.device), text).sample
        weights = self.schedule.weights(drawn.timesteps, self.run.train.min_snr_gamma).to(self.device)
        return (weights * loss_per_sample(predicted, drawn.noise.to(self.device))).mean()

    def _rate(self) -> float:
        """The learning rate at this point, a function of images seen."""
        settings, seen = self.run.train, self.progress.images_seen
        warm = min(1.0, (seen + settings.batch) / settings.warmup_images) if settings.warmup_images else 1.0
        if settings.schedule == "cosine":
            warm *= 0.5 * (1 + math.cos(math.pi * min(1.0, seen / settings.images)))
        return settings.learning_rate * warm

    def save(self) -> Checkpoint:
        """Write EMA weights and trainer state, then the manifest that makes them a checkpoint."""
        run, progress = self.run, self.progress
        progress.ema_updates = self.ema.updates
        path = f"checkpoints/{run.name}/{progress.images_seen:09d}"
        with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
            with self.ema.applied():
                checkpoints.save_weights(self.bare_unet, Path(scratch) / "weights", lora=run.train.lora_rank is not None)
            trainer_state.save(Path(scratch) / "state", self.trained, self.ema, self._bare_optimizer, progress)
            checkpoint = Checkpoint(
                path=path,
                run=run.name,
                images_seen=progress.images_seen,
                base=run.diffusion.model_dump(),
                files={},
                lora=run.train.lora_rank is not None,
                training={**run.provenance, "settings": run.train.model_dump(mode="json"), "losses": progress.losses},
            )
            return checkpoints.write(run.store, checkpoint, Path(scratch) / "weights", Path(scratch) / "state")


def accelerator(settings: Train, workers: int) -> Accelerator:
    """Accelerate for this process. Raises RuntimeError unless it sees every worker of the group."""
    cpu = not torch.cuda.is_available()
    if cpu and settings.precision == "fp16":
        raise ValueError("train.precision='fp16' needs a GPU; try bf16 or fp32")
    found = Accelerator(cpu=cpu, mixed_precision="no" if settings.precision == "fp32" else settings.precision)
    if found.num_processes != workers:
        raise RuntimeError(f"accelerate sees {found.num_processes} processes, the group has {workers}: they would train apart")
    return found


def trainable(unet: Any, settings: Train) -> dict[str, torch.nn.Parameter]:
    """Choose what is trained, all weights or new adapters on the attention layers, and return it by name."""
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if settings.lora_rank is not None:
        from peft import LoraConfig

        unet.requires_grad_(False)
        torch.manual_seed(settings.seed)  # the adapters' initial weights: equal on every worker
        rank = settings.lora_rank
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    else:
        unet.requires_grad_(True)
    return {name: value for name, value in unet.named_parameters() if value.requires_grad}
