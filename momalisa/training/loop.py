"""The training loop: cached moments in, checkpoints out. One process of one or many; the shell brings the group.

Everything random is a function of (seed, epoch, sample id) (see `sampler` and `momalisa.diffusion.draws`), so the
samples, their noise and the mean loss of a step are the same at any number of workers.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint
from momalisa.config import Diffusion, Train
from momalisa.diffusion import Schedule, loss_per_sample
from momalisa.latents import Autoencoder, TextEncoder
from momalisa.storage import Store
from momalisa.training import state as trainer_state
from momalisa.training.batches import Batches, Pass, Texts
from momalisa.training.cache import LatentCache
from momalisa.training.ema import Ema
from momalisa.training.state import Progress
from momalisa.training.writer import Snapshot, Writer

LOG_EVERY = 10  # steps
EXPLODED = 10.0  # times the median of the losses so far


class Diverged(FloatingPointError):
    """The loss is no number, or has exploded; the message names the works that were in the batch."""


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
    stop_due: Callable[[int], bool] = lambda images_seen: False
    """Asked when a checkpoint is due, before it is made: whether it shall be the last."""


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
        self.unet, self.optimizer = self.accelerator.prepare(unet.train(), optimizer)
        self.bare_unet = self.accelerator.unwrap_model(self.unet)
        self._forward = torch.compile(self.unet, dynamic=False) if settings.compile else self.unet
        self.ema.to(self.device)
        self.progress = self._resume()
        if not self.progress.workers or self.progress.workers[-1][1] != self.accelerator.num_processes:
            self.progress.workers.append((self.progress.images_seen, self.accelerator.num_processes))
        self.batches = Batches(
            settings,
            run.cache,
            Schedule.load(run.diffusion),
            Texts(self.text_encoder, run.cache.token_ids, PRECISIONS[settings.precision]),
            Autoencoder.load(run.diffusion).scaling_factor,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.writer = Writer(run.store, settings.keep_states, events.checkpointed, settings.keep_weights)
        self.gradient_norm: torch.Tensor | float = 0.0
        if self.accelerator.num_processes > 1:
            self._rehearse()

    def _rehearse(self) -> None:
        """One exchange of gradients that are zero. DDP lays out its buckets anew after the first exchange of a process,
        which changes the order of float sums: so it does that before the first step, of fresh and resumed runs alike.
        """
        first = self.batches.make(self.progress.images_seen)[0]
        self.accelerator.backward(self.loss(replace(first, weights=torch.zeros_like(first.weights))))
        self.optimizer.zero_grad()

    def _resume(self) -> Progress:
        """Restore the newest checkpoint whose trainer state is whole; one that is not is passed over and said."""
        for saved in reversed(checkpoints.read_all(self.run.store, self.run.name)):
            if not saved.state:
                continue
            with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
                try:
                    folder = self.run.store.download(f"{saved.path}/state", saved.state, Path(scratch))
                except (ValueError, FileNotFoundError) as error:
                    print(f"train: {error}; going on from the checkpoint before", flush=True)
                    continue
                return trainer_state.restore(folder, self.trained, self.ema, self._bare_optimizer)
        return Progress()

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        bare: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return bare

    def train(self) -> Progress:
        """Run to the end. Raises Diverged at a loss that is no number or has exploded; the last checkpoint stands."""
        settings, progress = self.run.train, self.progress
        recent, began, first = [], time.monotonic(), progress.images_seen
        try:
            while progress.images_seen < settings.images:
                recent.append(self.step())
                ends = progress.images_seen >= settings.images
                if progress.step % LOG_EVERY == 0 or ends or self._checkpoint_due():
                    loss = self._mean(recent)
                    recent.clear()
                    progress.losses.append((progress.images_seen, loss))
                    if self.accelerator.is_main_process:
                        self._log(loss, (progress.images_seen - first) / (time.monotonic() - began))
                self._milestones(ends)
        finally:
            self.batches.close()
            self.writer.close()
        return progress

    def _log(self, loss: float, images_per_s: float) -> None:
        seen = self.progress.images_seen
        self.events.logged(
            {
                "loss": loss,
                "images_seen": seen,
                "images_per_s": images_per_s,
                "learning_rate": self._rate(),
                "gradient_norm": float(self.gradient_norm),
            }
        )

    def _mean(self, losses: list[torch.Tensor]) -> float:
        """The mean over the group and the steps since the last. Raises Diverged, on all workers alike."""
        steps = self.accelerator.reduce(torch.stack(losses), reduction="mean").tolist()
        usual = statistics.median([loss for _, loss in self.progress.losses] or [math.inf])
        for number, loss in enumerate(steps):
            if not math.isfinite(loss) or loss > EXPLODED * max(usual, 1.0):
                settings = self.run.train
                seen = self.progress.images_seen - (len(steps) - number) * settings.batch
                raise Diverged(
                    f"the loss is {loss:g} after {seen} images (usual: {usual:.4g}); the last checkpoint is whole. In the batch "
                    f"were: {', '.join(self.batches.ids(seen))}. Look at these works, or try a lower train.learning_rate "
                    f"(now {settings.learning_rate:g}) or train.precision=fp32 (now {settings.precision})"
                )
        return float(sum(steps) / len(steps))

    def _milestones(self, ends: bool) -> None:
        """After a step: pictures of the evaluation prompts and a checkpoint, where they are due."""
        settings, progress = self.run.train, self.progress
        if self.accelerator.is_main_process and (progress.step % settings.evaluate_every_steps == 0 or ends):
            with self.ema.applied():
                self.events.pictures_due(progress.images_seen, self.bare_unet.eval())
            self.bare_unet.train()
        if ends or self._checkpoint_due():
            if self.accelerator.is_main_process:
                self.writer.submit(self.snapshot())
                if ends:
                    self.writer.settle()
            self.events.synchronise({"loss": progress.losses[-1][1], "images_seen": progress.images_seen})

    def _checkpoint_due(self) -> bool:
        """Whether the last step crossed a multiple of `checkpoint_every_images`; its loss is looked at first."""
        settings, seen = self.run.train, self.progress.images_seen
        return seen // settings.checkpoint_every_images > (seen - settings.batch) // settings.checkpoint_every_images

    def step(self) -> torch.Tensor:
        """One optimizer step over one global batch.

        Returns a scalar on the device, whose mean over the workers is the batch's mean loss.
        """
        settings, progress = self.run.train, self.progress
        for group in self._bare_optimizer.param_groups:
            group["lr"] = self._rate()
        parts = self.batches.at(progress.images_seen)
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, 1):
            with contextlib.nullcontext() if number == len(parts) else self.accelerator.no_sync(self.unet):
                loss = self.loss(part)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.gradient_norm = self.accelerator.clip_grad_norm_(self.trained.values(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        progress.images_seen += settings.batch
        progress.step += 1
        return total

    def loss(self, part: Pass) -> torch.Tensor:
        """The weighted loss of a pass, a scalar: times the workers, because DDP divides their sum by them."""
        here = part.to(self.device)
        text = here.text if here.text.dim() == 3 else self.text_encoder.embed(here.text)
        predicted = self._forward(here.noisy, here.timesteps, text).sample
        total: torch.Tensor = (here.weights * loss_per_sample(predicted, here.noise)).sum() * self.accelerator.num_processes
        return total

    def _rate(self) -> float:
        """The learning rate at this point, a function of images seen."""
        settings, seen = self.run.train, self.progress.images_seen
        warm = min(1.0, (seen + settings.batch) / settings.warmup_images) if settings.warmup_images else 1.0
        if settings.schedule == "cosine":
            warm *= 0.5 * (1 + math.cos(math.pi * min(1.0, seen / settings.images)))
        return settings.learning_rate * warm

    def snapshot(self) -> Snapshot:
        """This moment, copied: what becomes a checkpoint."""
        run, progress = self.run, self.progress
        progress.ema_updates = self.ema.updates
        state = trainer_state.tensors(self.trained, self.ema, self._bare_optimizer)
        history = {"losses": list(progress.losses), "workers": list(progress.workers)}
        checkpoint = Checkpoint(
            path=f"checkpoints/{run.name}/{progress.images_seen:09d}",
            run=run.name,
            images_seen=progress.images_seen,
            base=run.diffusion.model_dump(),
            files={},
            lora=run.train.lora_rank is not None,
            training={**run.provenance, "settings": run.train.model_dump(mode="json"), **history},
        )
        average = {name: state[f"ema/{name}"] for name in self.trained}
        return Snapshot(checkpoint, self.bare_unet, average, state, asdict(progress))


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
