"""What people see of a run while it goes: lines, W&B curves, and pictures of the evaluation prompts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from momalisa.checkpoint import Checkpoint
from momalisa.config import Settings
from momalisa.contact_sheet import contact_sheet
from momalisa.engine import Engine, Request
from momalisa.storage import Store
from momalisa.tracking import Tracker
from momalisa.training.loop import Events
from momalisa.training.run import Plan

EVALUATION_SEED = 1000


@contextmanager
def watch(settings: Settings, planned: Plan, enabled: bool) -> Iterator[Events]:
    """The events of one worker; only an enabled one (the main process) shows anything."""
    if not enabled:
        yield Events()
        return
    tracker = Tracker(settings, planned.name, "train")
    store, chosen = Store(settings.root), settings.train
    prompts = list(chosen.evaluation_prompts)
    requests = [
        Request(
            prompt=prompt,
            seed=EVALUATION_SEED + index,
            steps=chosen.evaluation_steps,
            guidance_scale=chosen.evaluation_guidance,
            size_px=settings.encode.resolution_px,
        )
        for index, prompt in enumerate(prompts)
    ]
    engines: list[Engine] = []

    def logged(metrics: dict[str, float]) -> None:
        tracker.log(metrics)
        done, total = int(metrics["images_seen"]), chosen.images
        left_min = (total - done) / max(metrics["images_per_s"], 1e-9) / 60
        print(
            f"train {done}/{total} images  {100 * done / total:.0f}%  loss {metrics['loss']:.4f}  "
            f"{metrics['images_per_s']:.0f} images/s  {left_min:.1f} min left",
            flush=True,
        )

    def checkpointed(checkpoint: Checkpoint) -> None:
        print(f"train: checkpoint {checkpoint.id}", flush=True)

    def pictures_due(images_seen: int, unet: torch.nn.Module) -> None:
        if not prompts:
            return
        if not engines:
            engines.append(Engine.load(settings.diffusion, unet, next(unet.parameters()).device))
        pictures = engines[0].generate(requests)
        tracker.pictures(images_seen, prompts, pictures)
        sink = io.BytesIO()
        contact_sheet([(f"{images_seen} images seen", pictures)], settings.encode.resolution_px).save(sink, "PNG")
        store.write_bytes(f"reports/{planned.name}/{images_seen:09d}.png", sink.getvalue())

    try:
        yield Events(logged=logged, checkpointed=checkpointed, pictures_due=pictures_due)
    finally:
        tracker.finish()
