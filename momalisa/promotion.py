"""Choose the best checkpoint on evidence, and say which one it is by moving `refs/best`, last of all.

The order of arguments: the checkpoint with the lowest loss on held-out works is the candidate; it is promoted if that
loss is below the base's. Its distance to the collection (MMD) and its pictures beside the base's go on record.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import BEST, Checkpoint, NoCheckpoint
from momalisa.config import Settings
from momalisa.contact_sheet import contact_sheet
from momalisa.dataset import Dataset
from momalisa.diffusion import Schedule
from momalisa.engine import Engine, Request
from momalisa.latents import Autoencoder, TextEncoder
from momalisa.quality import ClipFeatures, Difference, held_out_losses, mmd2, paired_difference
from momalisa.storage import Store
from momalisa.training import run as runs
from momalisa.training.run import Plan
from momalisa.weights import identity, short_id

PICTURE_SEED = 10_000
CONTACT_SEED = 1000  # as the evaluation pictures of training


class NoImprovement(ValueError):
    """No checkpoint is better than the base model; the message says what to try."""


def candidates(settings: Settings, planned: Plan) -> list[Checkpoint]:
    """Every checkpoint of the run. Raises NoCheckpoint where there is none."""
    found = checkpoints.read_all(Store(settings.root), planned.name)
    if not found:
        raise NoCheckpoint(f"{settings.root}/checkpoints/{planned.name} holds no checkpoint: run the train job first")
    return found


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_unet(settings: Settings, path: str | None) -> Any:
    """The UNet of a checkpoint's path, or the base's for None, on this machine's device."""
    if path is None:
        return checkpoints.load_base_unet(settings.diffusion).to(device())
    store = Store(settings.root)
    return checkpoints.load_unet(store, checkpoints.read(store, path)).to(device())


def losses(settings: Settings, planned: Plan, paths: Sequence[str | None]) -> list[np.ndarray]:
    """Held-out losses [works] of several checkpoints (None: the base) on one grid."""
    _, held_out = runs.split(settings, planned)
    works = held_out.rows(list(range(min(len(held_out), settings.promote.max_pictures))))
    text_encoder = TextEncoder.load(settings.diffusion, device())
    factor = Autoencoder.load(settings.diffusion).scaling_factor
    schedule, chosen = Schedule.load(settings.diffusion, settings.train.zero_terminal_snr), settings.promote
    return [
        held_out_losses(load_unet(settings, path), schedule, text_encoder, factor, works, chosen.timesteps, chosen.batch)
        for path in paths
    ]


def generate(settings: Settings, path: str | None, prompts: Sequence[str], first_seed: int) -> list[bytes]:
    """PNG pictures of prompts by a checkpoint (None: the base), at seeds that are equal for every checkpoint."""
    engine = Engine.load(settings.diffusion, load_unet(settings, path), device())
    chosen, pictures = settings.promote, []
    for start in range(0, len(prompts), chosen.batch):
        requests = [
            Request(
                prompt=prompt,
                seed=first_seed + start + index,
                steps=chosen.distance_steps,
                guidance_scale=chosen.guidance_scale,
                size_px=settings.encode.resolution_px,
            )
            for index, prompt in enumerate(prompts[start : start + chosen.batch])
        ]
        pictures += [png(picture) for picture in engine.generate(requests)]
    return pictures


def png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def opened(pictures: Sequence[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]


def references(settings: Settings, planned: Plan) -> tuple[list[tuple[str, Image.Image]], list[Image.Image]]:
    """(caption, picture) pairs that generated pictures are compared with, and more pictures of the same captions.

    The miniature museum's works never end, so both come from seeds that nobody has seen; a real collection has its
    held-out works and no more.
    """
    if settings.promote.reference == "wing":
        from momalisa.miniature.wing import further_works

        count = settings.promote.distance_pictures
        pairs = [(settings.caption.prefix + caption, picture) for caption, picture in further_works(count, seed=1)]
        return pairs, [picture for _, picture in further_works(count, seed=2)]
    _, held_out = runs.split(settings, planned)
    captions = dict(zip(held_out.ids, held_out.captions, strict=True))
    dataset = Dataset(settings.dataset)
    rows = dataset.rows(dataset.latest().images, ["id", "bytes"])
    pairs = [(captions[row["id"]], opened([row["bytes"]])[0]) for row in rows if row["id"] in captions]
    return pairs[: settings.promote.distance_pictures], []


def comparison(settings: Settings, prompts: Sequence[str], base: Sequence[bytes], best: Sequence[bytes]) -> bytes:
    """The contact sheet as a PNG: for each prompt the base's picture, then the best's; two prompts a row."""
    names = [prompt.removeprefix(settings.caption.prefix) for prompt in prompts]
    pairs = list(zip(opened(base), opened(best), strict=True))
    rows = [
        ("   |   ".join(names[i : i + 2]), [picture for pair in pairs[i : i + 2] for picture in pair])
        for i in range(0, len(names), 2)
    ]
    return png(contact_sheet(rows, min(settings.encode.resolution_px, 256)))


@dataclass(frozen=True)
class Distance:
    """MMD^2 x 1000 of generated pictures to the collection, and of the collection to more of itself (None: too few)."""

    base: float
    best: float
    collection: float | None


def distance(
    settings: Settings,
    reference: Sequence[Image.Image],
    more: Sequence[Image.Image],
    base: Sequence[bytes],
    best: Sequence[bytes],
) -> Distance:
    """How far the base's and the best's pictures are from the reference."""
    assert settings.promote.clip_model is not None
    features = ClipFeatures(settings.promote.clip_model, settings.promote.clip_revision, device())
    target = features(reference)
    return Distance(
        base=mmd2(features(opened(base)), target),
        best=mmd2(features(opened(best)), target),
        collection=mmd2(features(more), target) if len(more) > 1 else None,
    )


@dataclass(frozen=True)
class Choice:
    """The candidate and the evidence for it."""

    best: Checkpoint
    base_loss: float
    best_loss: float
    delta: Difference
    curve: list[tuple[int, float]]  # (images seen, held-out loss) of every checkpoint; the base at 0


def choose(settings: Settings, found: Sequence[Checkpoint], base: np.ndarray, scored: Sequence[np.ndarray]) -> Choice:
    """The checkpoint with the lowest held-out loss. Raises NoImprovement unless it beats the base."""
    best = min(range(len(found)), key=lambda index: float(scored[index].mean()))
    delta = paired_difference(base, scored[best])
    if delta.mean >= 0 and not settings.promote.allow_worse:
        raise NoImprovement(
            f"no checkpoint of {found[best].run} has a held-out loss below the base's {base.mean():.5f} "
            f"(best: {scored[best].mean():.5f} at {found[best].images_seen} images); train longer, lower train.learning_rate, "
            "or set promote.allow_worse"
        )
    curve = [(0, float(base.mean())), *((c.images_seen, float(s.mean())) for c, s in zip(found, scored, strict=True))]
    return Choice(found[best], float(base.mean()), float(scored[best].mean()), delta, curve)


def evidence_id(settings: Settings, found: Sequence[Checkpoint]) -> str:
    """A name for a decision's inputs: a second run over the same ones has nothing new to say."""
    chosen = settings.promote
    clip = identity(chosen.clip_model, chosen.clip_revision) if chosen.clip_model else None
    decisive = chosen.model_dump(exclude={"cpus_per_task", "gpus_per_task", "tasks", "batch"})
    return short_id(decisive, clip, [(checkpoint.path, sorted(checkpoint.files.items())) for checkpoint in found])


def promoted(settings: Settings) -> dict[str, Any] | None:
    """What `refs/best` says now, or None."""
    store = Store(settings.root)
    return dict(store.read_json(BEST)) if store.exists(BEST) else None


def publish(settings: Settings, choice: Choice, measured: Distance | None, evidence: str) -> dict[str, Any]:
    """Move `refs/best`; returns what it says. Nothing may follow this write."""
    pointer = {
        "checkpoint": choice.best.path,
        "evidence": evidence,
        "scores": {
            "heldout_loss_base": choice.base_loss,
            "heldout_loss_best": choice.best_loss,
            "heldout_loss_delta_ci95": [choice.delta.low, choice.delta.high],
            "heldout_curve": choice.curve,
            "mmd_base": measured.base if measured else None,
            "mmd_best": measured.best if measured else None,
            "mmd_collection": measured.collection if measured else None,
        },
        "base": asdict(choice.best)["base"],
    }
    Store(settings.root).write_json(BEST, pointer)
    return pointer
