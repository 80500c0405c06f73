"""Choose the best checkpoint on evidence, and say which one it is by moving `refs/best`, last of all.

`measure` measures one model, `panel` says which ones are measured, `decision` holds the rules, `explain` shows them,
`ledger` publishes, records and takes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from momalisa import checkpoint as checkpoints
from momalisa import votes
from momalisa.checkpoint import BEST, Checkpoint, NoCheckpoint
from momalisa.checkpoint.card import card
from momalisa.config import Settings
from momalisa.contact_sheet import contact_sheet
from momalisa.promotion import ledger
from momalisa.promotion.decision import Decision
from momalisa.promotion.measure import opened, png
from momalisa.storage import Store
from momalisa.training import posthoc
from momalisa.training.run import Plan
from momalisa.weights import identity, short_id

CONTACT_SEED = 1000  # as the evaluation pictures of training


class NoImprovement(ValueError):
    """No checkpoint may be promoted; the message says why and what to try."""


def candidates(settings: Settings, planned: Plan) -> list[Checkpoint]:
    """The run's checkpoints that belong to this base, then averages made of them. Raises NoCheckpoint where there is none."""
    base, found = settings.diffusion.model_dump(), []
    for checkpoint in checkpoints.read_all(Store(settings.root), planned.name):
        if checkpoint.base == base:
            found.append(checkpoint)
        else:
            print(f"promote: {checkpoint.name} belongs to another base ({checkpoint.base['model']}); passed over", flush=True)
    if not found:
        raise NoCheckpoint(f"{settings.root}/checkpoints/{planned.name} holds no checkpoint: run the train job first")
    return found + posthoc.chosen(settings, found[-1])


def require(settings: Settings, decision: Decision) -> None:
    """Raises NoImprovement where there is no best."""
    if decision.best is not None:
        return
    from momalisa.promotion.explain import verdict

    said = "; ".join(f"{one.name}: {verdict(settings.promote, decision, one)}" for one in decision.candidates[-3:])
    raise NoImprovement(
        f"{decision.reason}. {said}. Train "
        "longer, lower train.learning_rate, look at the table of --explain, or set promote.allow_worse"
    )


def evidence_id(settings: Settings, found: Sequence[Checkpoint]) -> str:
    """A name for a decision's inputs: a second run over the same ones has nothing new to say."""
    chosen = settings.promote
    judges = [(chosen.clip_model, chosen.clip_revision), (chosen.alignment_model, chosen.alignment_revision)]
    named = [identity(model, revision) if model else None for model, revision in judges]
    decisive = chosen.model_dump(exclude={"cpus_per_task", "gpus_per_task", "tasks", "batch", "measure_all", "watch_patience_s"})
    weights = [(checkpoint.path, sorted(checkpoint.files.items())) for checkpoint in found]
    return short_id(decisive, named, weights, votes.identity(votes.read(Store(settings.root))))


def promoted(settings: Settings) -> dict[str, Any] | None:
    """What `refs/best` says now, or None."""
    found = Store(settings.root).read_pointer(BEST).value
    return dict(found) if found else None


def publish(settings: Settings, decision: Decision, evidence: str) -> dict[str, Any]:
    """Write the card's scores, then move `refs/best`; returns what it says. Raises Overtaken where another was first."""
    assert decision.best is not None
    assert decision.best.checkpoint is not None
    store, best, scores = Store(settings.root), decision.best.checkpoint, decision.scores()
    seen = store.read_pointer(BEST)
    store.write_bytes(f"{best.path}/README.md", card(asdict(best), scores).encode())
    return ledger.promote(store, best, "evidence", seen, scores, evidence, decision.reason)


def by_hand(settings: Settings, name: str) -> dict[str, Any]:
    """Promote `RUN@IMAGES`, whatever the scores say. Raises NoCheckpoint, or ValueError where it is damaged or foreign."""
    store = Store(settings.root)
    seen, checkpoint = store.read_pointer(BEST), checkpoints.find(store, name)
    if checkpoint.base != settings.diffusion.model_dump():
        raise ValueError(
            f"{name} belongs to another base ({checkpoint.base['model']}) than diffusion.model {settings.diffusion.model}"
        )
    evidence = seen.value.get("evidence") if seen.value else None
    return ledger.promote(store, checkpoint, "hand", seen, {}, evidence, "by hand")


def comparison(settings: Settings, prompts: Sequence[str], base: Sequence[bytes], best: Sequence[bytes]) -> bytes:
    """The contact sheet as a PNG: for each prompt the base's picture, then the best's; two prompts a row."""
    names = [prompt.removeprefix(settings.caption.prefix) for prompt in prompts]
    pairs = list(zip(opened(base), opened(best), strict=True))
    rows = [
        ("   |   ".join(names[i : i + 2]), [picture for pair in pairs[i : i + 2] for picture in pair])
        for i in range(0, len(names), 2)
    ]
    return png(contact_sheet(rows, min(settings.encode.resolution_px, 256)))
