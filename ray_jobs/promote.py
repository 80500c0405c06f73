"""promote: measure every checkpoint of the run, choose the best on evidence, and move refs/best to it.

    python -m ray_jobs.promote --config configs/demo.yaml
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.promote --config configs/sd14.yaml

Writes a contact sheet (base above best, equal seeds) to reports/<run>/contact.png, logs the model to W&B as an
artifact with the alias `best`, and writes refs/best last.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from momalisa.config import Settings
from ray_jobs._job import job

if TYPE_CHECKING:
    from momalisa.checkpoint import Checkpoint
    from momalisa.promotion import Distance
    from momalisa.training.run import Plan


def run(settings: Settings) -> dict[str, Any]:
    """Choose, publish, and return the stage's summary."""
    from momalisa import promotion
    from momalisa.training import run as runs
    from ray_jobs._cluster import connect

    began = time.monotonic()
    planned = runs.plan(settings)
    found = promotion.candidates(settings, planned)
    evidence = promotion.evidence_id(settings, found)
    pointer = promotion.promoted(settings)
    new = pointer is None or pointer["evidence"] != evidence
    if pointer is None or new:
        connect()
        paths = [None, *(checkpoint.path for checkpoint in found)]
        base, *scored = _map(settings, promotion.losses, [(settings, planned, paths)])[0]
        choice = promotion.choose(settings, found, base, scored)
        print(f"promote: {choice.best.id}, held-out loss {choice.best_loss:.5f} (base {choice.base_loss:.5f})", flush=True)
        show(settings, planned, choice.best)
        measured = measure(settings, planned, choice.best)
        log_artifact(settings, planned, choice.best, choice.best_loss)
        pointer = promotion.publish(settings, choice, measured, evidence)
    else:
        print(f"promote: nothing new ({pointer['checkpoint']} is the best of {len(found)})")
    return {
        "stage": "promote",
        "rows_in": len(found),
        "rows_out": 1,
        "rejected": len(found) - 1,
        "checkpoint": pointer["checkpoint"],
        "scores": pointer["scores"],
        "new": int(new),
        "seconds": time.monotonic() - began,
    }


def _map(settings: Settings, function: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
    """Call a library function in Ray tasks with the configured share of a machine, in order."""
    import ray

    def threaded(*arguments: Any) -> Any:
        import torch

        torch.set_num_threads(max(1, int(settings.promote.cpus_per_task)))
        return function(*arguments)

    task = ray.remote(num_cpus=settings.promote.cpus_per_task, num_gpus=settings.promote.gpus_per_task)(threaded)
    return list(ray.get([task.remote(*arguments) for arguments in calls]))


def show(settings: Settings, planned: Plan, best: Checkpoint) -> None:
    """The contact sheet: the base's pictures and the best's, prompt by prompt."""
    from momalisa import promotion
    from momalisa.storage import Store

    prompts = list(settings.promote.contact_prompts)
    if not prompts:
        return
    calls = [(settings, path, prompts, promotion.CONTACT_SEED) for path in (None, best.path)]
    base_pictures, best_pictures = _map(settings, promotion.generate, calls)
    sheet = promotion.comparison(settings, prompts, base_pictures, best_pictures)
    Store(settings.root).write_bytes(f"reports/{planned.name}/contact.png", sheet)


def measure(settings: Settings, planned: Plan, best: Checkpoint) -> Distance | None:
    """Distance to the collection of the base's and the best's pictures; None where it is switched off."""
    from momalisa import promotion

    chosen = settings.promote
    if not chosen.distance_pictures or chosen.clip_model is None:
        return None
    reference, more = promotion.references(settings, planned)
    prompts = [caption for caption, _ in reference]
    print(f"promote: 2 x {len(prompts)} pictures for the distance to the collection", flush=True)
    size = -(-len(prompts) // chosen.tasks)
    starts = range(0, len(prompts), size)
    calls = [
        (settings, path, prompts[start : start + size], promotion.PICTURE_SEED + start)
        for path in (None, best.path)
        for start in starts
    ]
    parts = _map(settings, promotion.generate, calls)
    drawn = [list(itertools.chain.from_iterable(half)) for half in (parts[: len(starts)], parts[len(starts) :])]
    pictures = [picture for _, picture in reference]
    measured: Distance = _map(settings, promotion.distance, [(settings, pictures, more, *drawn)])[0]
    print(f"promote: distance to the collection {measured.best:.3f} (base {measured.base:.3f})", flush=True)
    return measured


def log_artifact(settings: Settings, planned: Plan, best: Checkpoint, loss: float) -> None:
    """The promoted weights as a W&B model artifact with the alias `best`."""
    from momalisa.storage import Store
    from momalisa.tracking import Tracker

    tracker = Tracker(settings, planned.name, "promote")
    with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
        weights = Store(settings.root).download(f"{best.path}/weights", best.files, Path(scratch))
        tracker.artifact(settings.name, weights, {"checkpoint": best.id, "heldout_loss": loss}, alias="best")
        tracker.finish()


def main() -> None:
    job(__doc__, "promote", run, lambda done: f"refs/best is {done['checkpoint']}, {done['seconds']:.0f} s")


if __name__ == "__main__":
    main()
