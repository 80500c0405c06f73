"""The training loop: cached moments in, checkpoints out. One process of one or many; the shell brings the group.

Everything random is a function of (seed, epoch, sample id) (see `sampler` and `momalisa.diffusion.draws`), so the
samples, their noise and the mean loss of a step are the same at any number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from momalisa import attention
from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint
from momalisa.config import Diffusion, Train
from momalisa.diffusion import Schedule, loss_per_sample
from momalisa.latents import Autoencoder, TextEncoder
from momalisa.storage import StorageError, Store, canonical_json
from momalisa.training import node
from momalisa.training import optimizer as optimizers
from momalisa.training import state as trainer_state
from momalisa.training.batches import Batches, Pass, Texts
from momalisa.training.cache import LatentCache
from momalisa.training.ema import Ema, PowerEma
from momalisa.training.metrics import Flops, Meter, known_peak
from momalisa.training.model import Denoiser, Prior, publishable
from momalisa.training.prior import PROMPTS
from momalisa.training.processes import PRECISIONS, accelerator, compress, layout
from momalisa.training.profile import STORED
from momalisa.training.state import Host, Progress
from momalisa.training.writer import Snapshot, Writer

LOG_EVERY = 10  # steps
EXPLODED = 10.0  # times the median of the losses so far, or times 1, the loss of a model that predicts nothing


class Diverged(FloatingPointError):
    """The loss or a gradient is no number, or the loss has exploded; the message names the works that were in the batch."""


class Interrupted(RuntimeError):
    """Training was asked to end; the message says whether the checkpoint of this very step is written."""


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
    """What the shell wants to hear: called on the main process only, but for `synchronise` and `ending`, called on all."""

    logged: Callable[[dict[str, float]], None] = lambda metrics: None
    checkpointed: Callable[[Checkpoint], None] = lambda checkpoint: None
    pictures_due: Callable[[int, torch.nn.Module, TextEncoder], None] = lambda images_seen, unet, text_encoder: None
    synchronise: Callable[[dict[str, float]], None] = lambda metrics: None
    stop_due: Callable[[int], bool] = lambda images_seen: False
    """Asked when a checkpoint is due, before it is made: whether it shall be the last."""
    ending: Callable[[], bool] | None = None  # whether to end now; given to all workers or to none, one is enough to say so


class Trainer:
    """Fine-tunes a UNet on cached latents. `train()` runs to `settings.images`, from the last checkpoint if any."""

    def __init__(self, run: Run, events: Events, workers: int = 1) -> None:
        self.run, self.events, settings = run, events, run.train
        self.accelerator = accelerator(settings, workers)
        self.device = self.accelerator.device
        dtype = PRECISIONS[settings.precision]
        schedule = Schedule.load(run.diffusion, settings.zero_terminal_snr)
        self.text_encoder = TextEncoder.load(run.diffusion, self.device)
        denoiser = Denoiser(checkpoints.load_base_unet(run.diffusion), self.text_encoder, settings)
        attention.choose(denoiser.unet, self.device, dtype)
        self.layout = layout(self.device)
        if settings.optimizer != "adamw8bit":  # which makes weights contiguous, but not the moments that it has begun
            denoiser.unet.to(memory_format=self.layout)
        denoiser.unet.train()
        self.trained = denoiser.trained()
        optimizer = optimizers.build(settings, self.trained.values())
        self.denoiser, self.optimizer = self.accelerator.prepare(denoiser, optimizer)
        self.bare = denoiser
        self.ema = Ema(self.trained.items(), settings.ema_decay)  # where the weights are now, and laid out as they are
        self.powers = {sigma: PowerEma(self.trained.items(), sigma) for sigma in STORED} if settings.power_ema else {}
        if settings.ema_offload:
            for average in (self.ema, *self.powers.values()):
                average.to(torch.device("cpu"))
        if settings.gradient_compression == "bf16" and workers > 1:
            compress(self.denoiser)
        self.prior = Prior(denoiser, settings, dtype) if settings.prior_weight else None
        self.progress = self._resume()
        if not self.progress.workers or self.progress.workers[-1][1] != self.accelerator.num_processes:
            self.progress.workers.append((self.progress.images_seen, self.accelerator.num_processes))
        self.batches = Batches(
            settings,
            run.cache,
            schedule,
            Texts(
                self.text_encoder,
                run.cache.token_ids,
                dtype,
                general=PROMPTS if settings.prior_weight else (),
                trained=settings.lora_text_encoder,
            ),
            Autoencoder.load(run.diffusion).scaling_factor,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            beside_gpu=self.device.type == "cuda",
        )
        self._forward = self._compiled() if settings.compile else self.denoiser
        self.writer, self.host = Writer(run.store, settings, events.checkpointed), Host()
        self.gradient_norm = torch.zeros((), device=self.device)
        peak = settings.peak_tflops or known_peak(self.device, settings.precision)
        self.meter = Meter(len(schedule), self.device, peak)
        self.flops = Flops(dict(denoiser.unet.config)) if peak else None
        if self.accelerator.num_processes > 1:
            self._rehearse()

    def _compiled(self) -> Any:
        """The UNet, compiled for each shape of a pass. By default PyTorch goes on uncompiled after eight of them."""
        import torch._dynamo.config as dynamo

        dynamo.recompile_limit += self.batches.most_shapes()  # of all models in this process
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, dynamo.recompile_limit)
        return torch.compile(self.denoiser, dynamic=False)

    def _rehearse(self) -> None:
        """One exchange of gradients that are zero. DDP lays out its buckets anew after the first exchange of a process,
        which changes the order of float sums: so it does that before the first step, of fresh and resumed runs alike.
        """
        first = self.batches.make(self.progress.images_seen)[0]
        self.accelerator.backward(self.loss(replace(first, weights=torch.zeros_like(first.weights))))
        self.optimizer.zero_grad()

    def _resume(self) -> Progress:
        """Restore the newest checkpoint whose trainer state is whole. The main process chooses it, so all go on from the same.

        Raises OSError where another process cannot read that one.
        """
        with contextlib.ExitStack() as held:
            mine = self._newest(held) if self.accelerator.is_main_process else None
            (chosen,) = broadcast_object_list([mine and mine[0]])
            if chosen is None:
                return Progress()
            folder = mine[1] if mine else self._fetch(chosen, held)
            progress = trainer_state.restore(folder, self.trained, self.ema, self._bare_optimizer, self.powers)
            self.accelerator.wait_for_everyone()  # whoever came after the last had left would download it again
        if progress.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(progress.scaler)
        if self.run.train.early_stop_patience is None:
            progress.stopped = False
        return progress

    def _newest(self, held: contextlib.ExitStack) -> tuple[Checkpoint, Path] | None:
        """The newest whole one, and where its state is; one that is not is passed over and said."""
        for saved in reversed(checkpoints.read_all(self.run.store, self.run.name)):
            if not saved.state:
                continue
            try:
                return saved, held.enter_context(self._folder(saved))
            except StorageError:  # nothing is known of the checkpoint
                raise
            except (ValueError, FileNotFoundError) as error:
                print(f"train: {error}; going on from the checkpoint before", flush=True)
        return None

    def _folder(self, saved: Checkpoint) -> contextlib.AbstractContextManager[Path]:
        """A checkpoint's trainer state in a folder of this node: one process downloads it, all map it."""
        return node.shared(
            node.folder(self.run.train.cache_dir) / "states",
            hashlib.sha256(canonical_json(saved.state)).hexdigest()[:24],
            lambda place: self.run.store.download(f"{saved.path}/state", saved.state, place),
        )

    def _fetch(self, chosen: Checkpoint, held: contextlib.ExitStack) -> Path:
        """Where the state of the main process's choice is. Raises OSError."""
        try:
            return held.enter_context(self._folder(chosen))
        except (ValueError, FileNotFoundError) as error:
            raise OSError(
                f"worker {self.accelerator.process_index} cannot read the checkpoint from which worker 0 goes on ({error}); "
                f"is {self.run.store.root} the same place on every node?"
            ) from error

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        bare: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return bare

    def train(self) -> Progress:
        """Run to the end. Raises Diverged at a loss or a gradient that is no number, or a loss that has exploded; the last
        checkpoint stands."""
        settings, progress = self.run.train, self.progress
        recent: list[torch.Tensor] = []  # of each step: its loss, and the norm of its gradient
        first = progress.step + 1
        self.meter.reset()
        try:
            while progress.images_seen < settings.images and not progress.stopped:
                recent.append(torch.stack([self.step(), self.gradient_norm]))
                if progress.step == first and self.accelerator.is_main_process:
                    self.host.reserve(self._state())  # seconds for gigabytes, for which no checkpoint then waits
                ends = progress.images_seen >= settings.images
                if progress.step % LOG_EVERY == 0 or ends or self._checkpoint_due():
                    loss = self._mean(recent)
                    recent.clear()
                    progress.losses.append((progress.images_seen, loss))
                    self._log(loss)
                if self._checkpoint_due() and not ends:
                    ends = progress.stopped = self._stop_asked()
                self._milestones(ends)
                if not recent and not ends:
                    self._leave_if_asked()
        finally:
            self.batches.close()
            self.writer.close()
        return progress

    def _log(self, loss: float) -> None:
        """Tell the shell what happened since the last time, over the whole group."""
        bins = self.accelerator.reduce(self.meter.bins, reduction="sum")
        if self.accelerator.is_main_process:
            own = {"loss": loss, "images_seen": self.progress.images_seen, "learning_rate": self._rate()}
            figures = self.meter.read(bins, self.accelerator.num_processes)
            self.events.logged({**own, "gradient_norm": float(self.gradient_norm), **figures})
        self.meter.reset()

    def _stop_asked(self) -> bool:
        """Whether the shell wants this checkpoint to be the last; the main process is asked, and all do the same."""
        asked = False
        if self.accelerator.is_main_process:
            self.writer.settle()  # the checkpoint before is whole, and none is deleted while they are looked at
            asked = self.events.stop_due(self.progress.images_seen)
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.device), reduction="sum"))

    def _leave_if_asked(self) -> None:
        """Where losses were just looked at, so that going on from here has the same history. Raises Interrupted on all, and on
        none before the checkpoint is written: who ends first may take the others along."""
        if self.events.ending is None:
            return
        asked = torch.tensor(float(self.events.ending()), device=self.device)
        if not float(self.accelerator.reduce(asked, reduction="sum")):
            return
        failure = ""
        if self.accelerator.is_main_process:
            self.writer.settle()
            if self.writer.written != self.progress.images_seen:
                self._save()
                self.writer.settle()
            failure, self.writer.failure = self.writer.failure, ""  # said below
        (lost,) = broadcast_object_list([failure])
        seen, there = f"{self.progress.images_seen} images seen", "the same command goes on from"
        raise Interrupted(f"{seen}, but no checkpoint of them ({lost}); {there} the last" if lost else f"{seen}; {there} there")

    def _mean(self, recent: list[torch.Tensor]) -> float:
        """The mean loss over the group and the steps since the last. `recent`: (loss, norm of the gradient) of each.

        Raises Diverged, on all workers alike. In fp16 a gradient may overflow: its step is left out and the scale halved.
        """
        steps = self.accelerator.reduce(torch.stack(recent), reduction="mean").tolist()
        usual = statistics.median([loss for _, loss in self.progress.losses] or [math.inf])
        for number, (loss, norm) in enumerate(steps):
            seen = self.progress.images_seen - (len(steps) - number) * self.run.train.batch
            if not math.isfinite(loss) or loss > EXPLODED * max(usual, 1.0):
                raise self._diverged(f"the loss is {loss:g} after {seen} images (usual: {usual:.4g})", seen)
            if not math.isfinite(norm) and self.run.train.precision != "fp16":
                raise self._diverged(f"the norm of the gradient is {norm:g} after {seen} images (loss: {loss:.4g})", seen)
        return float(sum(loss for loss, _ in steps) / len(steps))

    def _diverged(self, what: str, seen: int) -> Diverged:
        settings = self.run.train
        return Diverged(
            f"{what}; the last checkpoint is whole. In the batch were: {', '.join(self.batches.ids(seen))}. Look at these works, "
            f"or try a lower train.learning_rate (now {settings.learning_rate:g}) or train.precision=fp32 (now "
            f"{settings.precision})"
        )

    def _milestones(self, ends: bool) -> None:
        """After a step: a checkpoint and pictures of the evaluation prompts, where they are due."""
        settings, progress = self.run.train, self.progress
        saves = ends or self._checkpoint_due()
        if self.accelerator.is_main_process:
            if saves:
                self._save()
            if progress.step % settings.evaluate_every_steps == 0 or ends:
                self._show()
            if ends:
                self.writer.settle()
        if saves:
            self.events.synchronise({"loss": progress.losses[-1][1], "images_seen": progress.images_seen})

    def _save(self) -> None:
        """Begin to write a checkpoint of this moment; the one before is written first, so that one copy is in memory."""
        self.writer.settle()
        self.writer.submit(self.snapshot())

    def _show(self) -> None:
        """Have pictures made; where that fails, the loss is these pictures and not the run."""
        try:
            with self.ema.applied():
                self.events.pictures_due(self.progress.images_seen, self.bare.unet.eval(), self.text_encoder)
        except Exception as error:  # a full disk, a full accelerator, whatever the shell shows them with
            seen = self.progress.images_seen
            print(f"train: no pictures after {seen} images ({type(error).__name__}: {error}); going on", flush=True)
        finally:
            self.bare.unet.train()

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
        began = time.monotonic()
        parts = self.batches.at(progress.images_seen)
        self.meter.waited_s += time.monotonic() - began
        self.meter.images += settings.batch
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, 1):
            with contextlib.nullcontext() if number == len(parts) else self.accelerator.no_sync(self.denoiser):
                loss = self.loss(part)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.gradient_norm = self.accelerator.clip_grad_norm_(self.trained.values(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        progress.images_seen += settings.batch
        progress.step += 1
        for average in self.powers.values():
            average.update(progress.images_seen, settings.batch)
        return total

    def loss(self, part: Pass) -> torch.Tensor:
        """The weighted loss of a pass, a scalar: times the workers, because DDP divides their sum by them."""
        here = part.to(self.device)
        noisy, timesteps, target, weights = here.noisy.to(memory_format=self.layout), here.timesteps, here.target, here.weights
        text = self._embedded(here.text)
        if self.prior is not None and here.general is not None:
            general = self._embedded(here.general)
            target = torch.cat([target, self.prior(noisy, timesteps, general)])
            noisy, timesteps, text = torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), torch.cat([text, general])
            weights = torch.cat([weights, weights * self.run.train.prior_weight])
        losses = loss_per_sample(self._forward(noisy, timesteps, text), target)
        own = len(here.weights)
        self.meter.losses(here.timesteps, losses[:own], here.weights)
        if self.flops is not None:
            self.meter.forward_flops += len(noisy) * self.flops(tuple(noisy.shape[1:]), text.shape[1])
        total: torch.Tensor = (weights * losses).sum() * self.accelerator.num_processes
        return total

    def _embedded(self, text: torch.Tensor) -> torch.Tensor:
        """Embeddings, of token ids too; those of an encoder that is trained stay for it."""
        return text if text.dim() == 3 or self.run.train.lora_text_encoder else self.text_encoder.embed(text)

    def _rate(self) -> float:
        """The learning rate at this point, a function of images seen."""
        settings, seen = self.run.train, self.progress.images_seen
        warm = min(1.0, (seen + settings.batch) / settings.warmup_images) if settings.warmup_images else 1.0
        if settings.schedule == "cosine":
            warm *= 0.5 * (1 + math.cos(math.pi * min(1.0, seen / settings.images)))
        return settings.learning_rate * warm

    def _state(self) -> dict[str, torch.Tensor]:
        return trainer_state.tensors(self.trained, self.ema, self._bare_optimizer, self.powers)

    def snapshot(self) -> Snapshot:
        """This moment, copied: what becomes a checkpoint. The one before must be written: its memory is used again."""
        run, progress = self.run, self.progress
        progress.ema_updates = self.ema.updates
        progress.scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        state = self.host.copy(self._state())
        history = {"losses": list(progress.losses), "workers": list(progress.workers), "stopped": progress.stopped}
        checkpoint = Checkpoint(
            path=f"checkpoints/{run.name}/{progress.images_seen:09d}",
            run=run.name,
            images_seen=progress.images_seen,
            base=run.diffusion.model_dump(),
            files={},
            lora=run.train.lora_rank is not None,
            training={**run.provenance, "settings": run.train.model_dump(mode="json"), **history},
        )
        average = publishable({name: state[f"ema/{name}"] for name in self.trained}, run.train)
        powers = {sigma: {name: state[f"ema-{sigma}/{name}"] for name in self.trained} for sigma in self.powers}
        return Snapshot(checkpoint, self.bare, average, state, asdict(progress), powers)
