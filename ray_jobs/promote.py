"""promote: measure every checkpoint of the run, choose the best on evidence, and move refs/best to it.

    python -m ray_jobs.promote --config configs/demo.yaml
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.promote --config configs/sd14.yaml

    --explain            print the table and write reports/<run>/promotion.html; move nothing
    --watch              measure checkpoints as training writes them, until the run is complete, then choose
    --to RUN@IMAGES      promote that one by hand
    --rollback           go back to what was promoted before
    --log                print every promotion, the newest first

Writes a contact sheet (base above best, equal seeds) to reports/<run>/contact.png and the reasons beside it, then moves
refs/best. Whenever that moved, the model goes to W&B as an artifact with the alias `best`. docs/promotion.md has the rules.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from momalisa.config import Settings
from ray_jobs._job import job

if TYPE_CHECKING:
    from momalisa.promotion.decision import Decision
    from momalisa.training.run import Plan

WATCH_S = 10.0  # between two looks for new checkpoints


def run(settings: Settings) -> dict[str, Any]:
    """Choose, publish, and return the stage's summary."""
    from momalisa import promotion
    from momalisa.training import run as runs

    began = time.monotonic()
    planned = runs.plan(settings)
    average(settings, planned)
    found = promotion.candidates(settings, planned)
    evidence = promotion.evidence_id(settings, found)
    pointer = promotion.promoted(settings)
    new = pointer is None or pointer.get("evidence") != evidence
    if pointer is None or new:
        decision = decide(settings, planned)
        promotion.require(settings, decision)
        show(settings, planned, decision)
        pointer = promotion.publish(settings, decision, evidence)
        log_artifact(settings, pointer)
    else:
        print(f"promote: nothing new ({pointer['checkpoint']} is the best of {len(found)})")
    return {
        "stage": "promote",
        "rows_in": len(found),
        "rows_out": 1,
        "rejected": len(found) - 1,
        "checkpoint": pointer["checkpoint"],
        "scores": pointer.get("scores", {}),
        "new": int(new),
        "seconds": time.monotonic() - began,
    }


def average(settings: Settings, planned: Plan) -> None:
    """With train.power_ema: make the averages of promote.ema_lengths that are not there yet."""
    from momalisa.storage import Store
    from momalisa.training import posthoc
    from ray_jobs._cluster import connect

    if wanted := posthoc.wanted(settings, planned.name):
        connect()
        failed = _map(settings, posthoc.attempt, [(Store(settings.root), *one) for one in wanted])
        for why in filter(None, failed):
            print(f"promote: {why}; passed over", flush=True)


def decide(settings: Settings, planned: Plan) -> Decision:
    """Measure in Ray tasks what is not measured yet, and write the report."""
    from momalisa import promotion
    from momalisa.promotion import explain
    from momalisa.promotion.panel import Panel
    from ray_jobs._cluster import connect

    connect()
    found = promotion.candidates(settings, planned)
    decision = Panel(settings, planned, found, lambda function, calls: _map(settings, function, calls)).decide()
    where = explain.write(settings, planned, decision)
    if decision.best is not None:
        losses = f"held-out loss {decision.best.loss:.5f} (base {decision.base.loss:.5f})"
        print(f"promote: {decision.best.name}, {losses}: {decision.reason}; {where}", flush=True)
    return decision


def _map(settings: Settings, function: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
    """Call a library function in Ray tasks with the configured share of a machine, `tasks` at a time, in order."""
    import ray

    def threaded(*arguments: Any) -> Any:
        import torch

        torch.set_num_threads(max(1, int(settings.promote.cpus_per_task)))
        return function(*arguments)

    task = ray.remote(num_cpus=settings.promote.cpus_per_task, num_gpus=settings.promote.gpus_per_task)(threaded)
    running: list[Any] = []
    for arguments in calls:
        if (over := len(running) - settings.promote.tasks + 1) > 0:
            ray.wait(running, num_returns=over)
        running.append(task.remote(*arguments))
    return list(ray.get(running))


def watch(settings: Settings) -> dict[str, Any]:
    """Measure the held-out losses of checkpoints as they appear, until the run is complete; then choose.

    Raises ValueError where none appears for `promote.watch_patience_s`.
    """
    from momalisa import promotion
    from momalisa.checkpoint import NoCheckpoint
    from momalisa.promotion.panel import Panel
    from momalisa.storage import Store
    from momalisa.training import run as runs
    from ray_jobs._cluster import connect

    connect()
    planned, patience_s, store = runs.plan(settings), settings.promote.watch_patience_s, Store(settings.root)
    print(f"promote: watching {planned.name}{_waits(settings)}", flush=True)
    told: set[str] = set()
    since = time.monotonic()
    while time.monotonic() - since < patience_s:
        written = {path for path in store.list(f"checkpoints/{planned.name}") if path.endswith("/manifest.json")}
        if written - told:
            told |= written
            try:
                found = promotion.candidates(settings, planned)
            except NoCheckpoint:  # none of these is whole
                continue
            _, measured = Panel(settings, planned, found, lambda function, calls: _map(settings, function, calls)).losses()
            for one in measured[-1:]:
                print(f"promote: {one.name} has a held-out loss of {one.loss:.5f}", flush=True)
            if runs.complete(settings, found):
                return run(settings)
            since = time.monotonic()
        time.sleep(WATCH_S)
    raise ValueError(
        f"no new checkpoint of {planned.name} for {patience_s:g} s (promote.watch_patience_s): training seems to be over. Start "
        "it again, or choose among those that there are: the same command without --watch"
    )


def _waits(settings: Settings) -> str:
    """What measuring has to wait for, where this cluster has no accelerator for it beside training's."""
    import ray

    wanted, held = settings.promote.gpus_per_task, settings.train.workers * settings.train.gpus_per_worker
    if not wanted or (there := ray.cluster_resources().get("GPU", 0)) >= wanted + held:
        return ""
    return f"; measuring waits until {wanted:g} of this cluster's {there:g} GPUs is free: on a single card, when training ends"


def show(settings: Settings, planned: Plan, decision: Decision) -> None:
    """The contact sheet: the base's pictures and the best's, prompt by prompt."""
    from momalisa import promotion
    from momalisa.promotion import measure
    from momalisa.storage import Store

    prompts, best = list(settings.promote.contact_prompts), decision.best
    if not prompts or best is None or best.checkpoint is None:
        return
    calls = [(settings, path, prompts, promotion.CONTACT_SEED) for path in (None, best.checkpoint.path)]
    base_pictures, best_pictures = _map(settings, measure.generate, calls)
    sheet = promotion.comparison(settings, prompts, base_pictures, best_pictures)
    Store(settings.root).write_bytes(f"reports/{planned.name}/contact.png", sheet)


def log_artifact(settings: Settings, pointer: dict[str, Any]) -> None:
    """What `refs/best` names now as a W&B model artifact with the alias `best`, after the dataset that it comes from."""
    if settings.wandb.mode == "disabled":  # weights are gigabytes
        return
    from momalisa import checkpoint as checkpoints
    from momalisa.storage import Store
    from momalisa.tracking import Tracker

    store = Store(settings.root)
    best = checkpoints.read(store, pointer["checkpoint"])
    tracker = Tracker(settings, best.run, "promote")
    with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
        weights = store.download(f"{best.path}/weights", best.files, Path(scratch))
        tracker.dataset(best.training.get("dataset"))
        tracker.artifact(settings.name, weights, {"checkpoint": best.name, **pointer["scores"]}, alias="best")
        tracker.finish()


def explain(settings: Settings) -> dict[str, Any]:
    """Print the table; nothing moves."""
    from momalisa.promotion import explain as explanation
    from momalisa.training import run as runs

    planned = runs.plan(settings)
    average(settings, planned)
    decision = decide(settings, planned)
    print(explanation.table(settings.promote, decision), flush=True)
    return {"said": decision.reason}


def rollback(settings: Settings) -> dict[str, Any]:
    from momalisa.promotion import ledger
    from momalisa.storage import Store

    pointer = ledger.rollback(Store(settings.root))
    log_artifact(settings, pointer)
    return {"said": f"refs/best is {pointer['checkpoint']} again"}


def by_hand(settings: Settings, name: str) -> dict[str, Any]:
    from momalisa import promotion

    pointer = promotion.by_hand(settings, name)
    log_artifact(settings, pointer)
    return {"said": f"refs/best is {pointer['checkpoint']}, by hand"}


def log(settings: Settings) -> dict[str, Any]:
    from momalisa.promotion import ledger
    from momalisa.storage import Store

    lines = [ledger.line(entry) for entry in ledger.log(Store(settings.root))]
    print("\n".join(lines), flush=True)
    return {"said": f"{len(lines)} promotions"}


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    action = parser.add_mutually_exclusive_group()
    for name in ("explain", "watch", "rollback", "log"):
        action.add_argument(f"--{name}", action="store_true")
    action.add_argument("--to", metavar="RUN@IMAGES")
    asked, rest = parser.parse_known_args(sys.argv[1:])
    doing = {"explain": explain, "rollback": rollback, "log": log}
    for name, function in doing.items():
        if getattr(asked, name):
            return job(__doc__, "promote", function, lambda done: str(done["said"]), rest)
    if asked.to:
        return job(__doc__, "promote", lambda settings: by_hand(settings, asked.to), lambda done: str(done["said"]), rest)
    said = lambda done: f"refs/best is {done['checkpoint']}, {done['seconds']:.0f} s"  # noqa: E731
    return job(__doc__, "promote", watch if asked.watch else run, said, rest)


if __name__ == "__main__":
    main()
