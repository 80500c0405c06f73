"""Averages whose length is chosen after training, made of the two that training kept (Karras et al. 2024, section 3.2).

Each becomes a checkpoint like any other, of the run `<run>-ema<sigma_rel>`: measured, promoted, exported and served.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint, averages
from momalisa.config import Settings, Train
from momalisa.latents import TextEncoder
from momalisa.storage import Store
from momalisa.training.model import Denoiser, publishable, save_trained
from momalisa.training.profile import Profile, coefficients

FARTHEST = 0.1  # distance of profiles, as a share of the wanted one's norm, up to which an average is made


def run_name(run: str, sigma_rel: float) -> str:
    return f"{run}-ema{sigma_rel:.3f}"


def make(store: Store, checkpoint: Checkpoint, sigma_rel: float) -> Checkpoint:
    """Write the average of this length that ends where a checkpoint does; one that is there already is made anew.

    Raises ValueError where the run kept no averages, or too few for this length.
    """
    parts, left = _parts(store, checkpoint, sigma_rel)
    values: dict[str, torch.Tensor] = {}
    for share, snapshot, stored in parts:
        for name, value in averages.load(store, snapshot, stored).items():
            values[name] = torch.add(values.get(name, torch.zeros_like(value)), value, alpha=share)
    train = Train(**checkpoint.training["settings"])
    denoiser = Denoiser(checkpoints.load_base_unet(checkpoint.diffusion), TextEncoder.load(checkpoint.diffusion), train)
    name = run_name(checkpoint.run, sigma_rel)
    made = replace(
        checkpoint,
        path=f"checkpoints/{name}/{checkpoint.images_seen:09d}",
        run=name,
        files={},
        state={},
        training={**checkpoint.training, "average": {"sigma_rel": sigma_rel, "distance": round(left, 6)}},
    )
    with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
        save_trained(Path(scratch) / "weights", denoiser, publishable(values, train))
        return checkpoints.write(store, made, Path(scratch) / "weights")


def attempt(store: Store, checkpoint: Checkpoint, sigma_rel: float) -> str | None:
    """`make`, where a failure is one candidate less: returns why it failed, or None."""
    try:
        make(store, checkpoint, sigma_rel)
    except (ValueError, OSError) as error:
        return f"the average of sigma_rel={sigma_rel:g} at {checkpoint.name} cannot be made: {error}"
    return None


def _parts(store: Store, checkpoint: Checkpoint, sigma_rel: float) -> tuple[list[tuple[float, averages.Snapshot, float]], float]:
    """(share, snapshot, its length) of what makes an average, and how far that is off."""
    found = [one for one in averages.read_all(store, checkpoint.run) if one.images_seen <= checkpoint.images_seen]
    stored = [(one, sigma) for one in found for sigma in one.lengths]
    if not stored:
        raise ValueError(f"{checkpoint.name} has no averages to choose from: train with train.power_ema=true")
    profiles = [Profile(one.images_seen, sigma) for one, sigma in stored]
    shares, left = coefficients(profiles, Profile(checkpoint.images_seen, sigma_rel))
    if left > FARTHEST:
        raise ValueError(
            f"{checkpoint.name}: an average of sigma_rel={sigma_rel:g} made of {len(found)} snapshots would be {left:.0%} off "
            f"(at most {FARTHEST:.0%}); lower train.checkpoint_every_images, or take a length nearer to 0.05 or 0.1"
        )
    return [(share, one, sigma) for share, (one, sigma) in zip(shares, stored, strict=True) if share], left


def wanted(settings: Settings, run: str) -> list[tuple[Checkpoint, float]]:
    """Which averages promote shall choose among and are not there yet: those that can be made at the newest checkpoint."""
    store = Store(settings.root)
    own = checkpoints.read_all(store, run) if settings.train.power_ema else []
    found = []
    for sigma_rel in settings.promote.ema_lengths if own else ():
        if store.exists(f"checkpoints/{run_name(run, sigma_rel)}/{own[-1].images_seen:09d}/manifest.json"):
            continue
        try:
            _parts(store, own[-1], sigma_rel)
        except ValueError as error:
            print(f"promote: {error}", flush=True)
            continue
        found.append((own[-1], sigma_rel))
    return found


def chosen(settings: Settings, newest: Checkpoint) -> list[Checkpoint]:
    """The averages of `promote.ema_lengths` that there are, ending where a run's newest checkpoint does."""
    lengths, store = settings.promote.ema_lengths if settings.train.power_ema else (), Store(settings.root)
    found = [one for length in lengths for one in checkpoints.read_all(store, run_name(newest.run, length))]
    return [one for one in found if one.images_seen == newest.images_seen]
