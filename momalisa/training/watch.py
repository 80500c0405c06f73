"""What people see of a run while it goes: lines, W&B or TensorBoard, and pictures of the evaluation prompts over time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint
from momalisa.config import Settings
from momalisa.contact_sheet import SHEET, column, timeline
from momalisa.engine import Engine, Request
from momalisa.latents import TextEncoder
from momalisa.progress import Progress
from momalisa.storage import Store
from momalisa.tracking import Tracker
from momalisa.training.loop import Events
from momalisa.training.run import Plan

EVALUATION_SEED = 1000


@contextmanager
def watch(
    settings: Settings, planned: Plan, enabled: bool, heard: Callable[[dict[str, float]], None] | None = None
) -> Iterator[Events]:
    """The events of one worker; only an enabled one (the main process) shows anything. `heard` gets the metrics too."""
    if not enabled:
        yield Events()
        return
    tracker, total = Tracker(settings, planned.name, "train"), settings.train.images
    gallery, stop = Gallery(settings, planned, tracker), EarlyStop(settings, planned)
    told: list[str] = []  # checkpoints
    before = [found.images_seen for found in checkpoints.read_all(Store(settings.root), planned.name) if found.state]
    bar = Progress("train", total, done=max(before, default=0), unit="images", rejected="")

    def logged(metrics: dict[str, float]) -> None:
        tracker.log(metrics)
        if heard is not None:
            heard(metrics)
        bar.update(int(metrics["images_seen"]), note=f"loss {metrics['loss']:.4f}")

    def checkpointed(checkpoint: Checkpoint) -> None:
        if not told:
            tracker.dataset(checkpoint.training.get("dataset"))
        told.append(checkpoint.name)
        print(f"train: checkpoint {checkpoint.name}", flush=True)

    try:
        with bar:
            yield Events(logged=logged, checkpointed=checkpointed, pictures_due=gallery.hang, stop_due=stop)
    finally:
        tracker.finish()


class Gallery:
    """Pictures of the evaluation prompts and of a user's own, at fixed seeds: a sheet each time, and one that grows."""

    def __init__(self, settings: Settings, planned: Plan, tracker: Tracker) -> None:
        chosen = settings.train
        self.settings, self.tracker, self.store = settings, tracker, Store(settings.root)
        self.folder = f"reports/{planned.name}"
        self.prompts = [*chosen.evaluation_prompts, *chosen.more_prompts]
        self.requests = [
            Request(
                prompt=prompt,
                seed=EVALUATION_SEED + index,
                steps=chosen.evaluation_steps,
                guidance_scale=chosen.evaluation_guidance,
                size_px=settings.encode.resolution_px,
            )
            for index, prompt in enumerate(self.prompts)
        ]
        self._engine: Engine | None = None

    def hang(self, images_seen: int, unet: torch.nn.Module, text_encoder: TextEncoder) -> None:
        """Draw them with these models, always the same ones, which are not kept waiting by whoever looks on.

        Raises what the engine or the store does; the next time is not touched by it.
        """
        if not self.prompts:
            return
        if self._engine is None:
            self._engine = Engine.load(
                self.settings.diffusion,
                unet,
                text_encoder.model.device,
                text_encoder=text_encoder,
                zero_terminal_snr=self.settings.train.zero_terminal_snr,
            )
        self._engine.forget_texts()  # the text encoder may be trained
        try:
            pictures = self._engine.generate(self.requests)
        except Exception:
            self._engine = None  # what was begun in it is given up
            raise
        self.tracker.pictures(images_seen, self.prompts, [request.seed for request in self.requests], pictures)
        self.store.write_bytes(f"{self.folder}/{images_seen:09d}.png", _png(column(pictures)))
        self.store.write_bytes(f"{self.folder}/{SHEET}", _png(self.sheet()))

    def sheet(self) -> Image.Image:
        """All that was hung so far: a row for each prompt, a column for each time. An earlier run's columns are among them;
        those of other prompts are left out, and files that are no pictures."""
        height, columns = self.settings.encode.resolution_px * len(self.prompts), []
        for path in self.store.list(self.folder):
            name = path.rsplit("/", 1)[-1].removesuffix(".png")
            if name.isdigit() and (picture := _read(self.store.read_bytes(path))) and picture.height == height:
                columns.append((f"{int(name):,}", picture))
        return timeline(self.prompts, columns)


def _read(data: bytes) -> Image.Image | None:
    """An RGB picture, or None where a file is cut off or is something else."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError):  # PIL's word for a broken PNG
        return None


def _png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def stalled(losses: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` losses is below the lowest before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


class EarlyStop:
    """Says at a checkpoint whether the held-out loss has not improved for `train.early_stop_patience` checkpoints.

    Measured losses are kept with the other evaluations, which outlive checkpoints: a resumed run, promotion, and a run that
    keeps few weights find them. What cannot be measured stops nothing. On an accelerator it needs room for a second UNet.
    """

    def __init__(self, settings: Settings, planned: Plan) -> None:
        here = settings.promote.model_copy(update={"gpus_per_task": settings.train.gpus_per_worker})  # where it trains
        self.settings, self.planned = settings.model_copy(update={"promote": here}), planned
        self.patience = settings.train.early_stop_patience
        self._said = False

    def __call__(self, images_seen: int) -> bool:
        if self.patience is None:
            return False
        try:
            losses = self.losses(images_seen)
        except Exception as error:  # of whoever looks on: the work goes on
            if not self._said:
                self._said = True
                print(f"train: no early stop for now ({type(error).__name__}: {error}); going on", flush=True)
            return False
        if not stalled(losses, self.patience):
            return False
        print(
            f"train: the held-out loss has not improved for {self.patience} checkpoints (lowest {min(losses):.5f}, now "
            f"{losses[-1]:.5f}); ends after {images_seen} images",
            flush=True,
        )
        return True

    def losses(self, images_seen: int) -> list[float]:
        """The mean held-out loss of every checkpoint so far, in order; of one that was deleted, as it was measured."""
        from momalisa.promotion import measure

        written = checkpoints.read_all(Store(self.settings.root), self.planned.name)
        results = {one.images_seen: measure.measured(self.settings, self.planned, one.path, measure.LOSSES) for one in written}
        whole = {images: result["held_out"] for images, result in results.items() if "error" not in result}
        found = measure.mean_losses(self.settings, self.planned)
        found |= {images: sum(losses) / len(losses) for images, losses in whole.items()}  # of these very weights
        return [loss for images, loss in sorted(found.items()) if images <= images_seen]
