"""Which checkpoints stay: weights and trainer state are counted apart, and what anybody points to is never deleted."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from momalisa.checkpoint import Checkpoint, read_all
from momalisa.checkpoint.averages import AVERAGES
from momalisa.storage import Store

REFS = "refs"
LOG = "promotions"
LOG_KEPT = 10  # the newest promotions, whose checkpoints a rollback may want


def retain(store: Store, run: str, keep_states: int, keep_weights: int | None) -> list[Checkpoint]:
    """Keep the trainer state of the newest `keep_states` checkpoints and the weights of the newest `keep_weights` (None: of
    all), besides those that are `held`; returns the checkpoints that are gone."""
    found = read_all(store, run)
    for old in found[:-keep_states]:
        forget_state(store, old)
    if keep_weights is None or len(found) <= keep_weights:
        return []
    kept = held(store, run)
    gone = [old for old in found[: -max(keep_weights, keep_states)] if old.path not in kept]
    for old in gone:
        forget(store, old)
    return gone


def held(store: Store, run: str) -> set[str]:
    """Paths of checkpoints that a pointer below refs/ or one of the last promotions names, and of the run's best so far."""
    named = [_json(store, path) for path in store.list(REFS)]
    named += [_json(store, path) for path in store.list(LOG)[-LOG_KEPT:]]
    paths = {str(value["checkpoint"]) for value in named if isinstance(value, dict) and "checkpoint" in value}
    measured = [_json(store, path) for path in store.list(f"evaluations/{run}") if path.endswith("/losses.json")]
    losses = {
        str(value["checkpoint"]): sum(value["held_out"]) / len(value["held_out"])
        for value in measured
        if isinstance(value, dict) and value.get("held_out")
    }
    own = {path: loss for path, loss in losses.items() if path.startswith(f"checkpoints/{run}/")}  # not the base's
    return paths | ({min(own, key=own.__getitem__)} if own else set())


def _json(store: Store, path: str) -> Any:
    try:
        return store.read_json(path)
    except (FileNotFoundError, ValueError):  # moved meanwhile, or not ours
        return None


def forget_state(store: Store, checkpoint: Checkpoint) -> None:
    """Keep a checkpoint's weights only. The manifest first: what it does not name is nobody's."""
    if not checkpoint.state:
        return
    store.write_json(f"{checkpoint.path}/manifest.json", asdict(replace(checkpoint, state={})))
    for name in checkpoint.state:
        store.delete(f"{checkpoint.path}/state/{name}")


def forget(store: Store, checkpoint: Checkpoint) -> None:
    """Delete a checkpoint. The manifest first: from then on it does not exist. Its averages are kept by rules of their own."""
    store.delete(f"{checkpoint.path}/manifest.json")
    for path in store.list(checkpoint.path):
        if not path.startswith(f"{checkpoint.path}/{AVERAGES}/"):
            store.delete(path)
