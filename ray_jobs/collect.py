"""collect: fetch the works of a museum or a folder that the dataset lacks, clean their pictures, publish a version.

    python -m ray_jobs.collect --config configs/demo.yaml [--collect.source.limit=50 ...]
    python -m ray_jobs.collect --config configs/demo.yaml --retry-failed    # ask again for the works that were rejected
    python -m ray_jobs.collect --config configs/demo.yaml --refresh         # ask again for usable ones, replace what has changed
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.collect --config configs/sd14.yaml

The demo's museum opens with `python -m momalisa.miniature.wing`. Run the job again when the museum has hung new works or
corrected its file: what was collected, or rejected, is passed by, and of what is told otherwise now only the words are taken.
A picture that cannot be used is a row that says why; above collect.max_bad_fraction nothing is published.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from momalisa.config import Collect, Settings
from ray_jobs._job import job


@dataclass
class Tally:
    """What the blocks came to so far."""

    works: int = 0
    ok: int = 0
    bad_before: int = 0  # of the works, those that were rejected before, and are
    corrected: int = 0  # of those that are ok, works whose picture nobody asked for
    new: int = 0
    resumed: int = 0  # of the works, those that a run before this one has stored
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, stored: Any) -> None:
        self.works += stored.works
        self.new += stored.new
        self.ok += stored.figures.ok
        self.bad_before += stored.figures.bad_before
        self.corrected += stored.figures.corrected
        self.reasons.update(stored.figures.reasons)
        self.examples = {**stored.figures.examples, **self.examples}

    def resume(self, rows: Iterable[dict[str, Any]], known: Mapping[str, Any]) -> None:
        """Count what a killed run has stored. `rows`: id, status, reason and error; `known`: id -> its place before."""
        from momalisa.records import OK

        for row in rows:
            self.works += 1
            self.ok += row["status"] == OK
            if row["status"] != OK:
                self.bad_before += row["id"] in known and not known[row["id"]].ok
                self.reasons[row["reason"]] += 1
                self.examples.setdefault(row["reason"], row["error"])
        self.new = self.resumed = self.works
        if self.resumed:
            print(f"collect: going on after {self.resumed} works of a run that was interrupted", flush=True)

    def judge(self, chosen: Collect) -> None:
        """Raises ValueError above max_bad_fraction. Judged are works that were asked for, and were not bad before."""
        judged = self.works - self.bad_before - self.corrected
        bad = self.works - self.bad_before - self.ok
        if bad > chosen.max_bad_fraction * judged:
            common = [(reason, count) for reason, count in self.reasons.most_common() if reason in self.examples][:3]
            reasons = "; ".join(f"{count} x {reason} ({self.examples[reason]})" for reason, count in common)
            raise ValueError(
                f"collect: {bad} of {judged} works were rejected, more than max_bad_fraction={chosen.max_bad_fraction:g}; "
                f"nothing was published. The most common reasons: {reasons}. Running again asks for them once more"
            )


def run(settings: Settings) -> dict[str, Any]:
    """Collect what is new, publish it, and return the stage's summary. Raises ValueError if too much was bad."""
    from momalisa.collect.plan import Plan
    from momalisa.collect.sources import open_source
    from momalisa.dataset import Dataset
    from momalisa.dataset.draft import Draft
    from momalisa.progress import Progress
    from momalisa.weights import short_id

    began, dataset, chosen = time.monotonic(), Dataset(settings.dataset), settings.collect
    began_at = dataset.latest()
    known = dataset.told_places(began_at.images)
    draft = Draft(dataset.store, "collect", short_id(began_at.sha256, decisive(chosen)))
    done = draft.entries()
    drafted = [table for entry in done for table in entry.tables]
    plan, tally = Plan(known, chosen, dataset.places(drafted)), Tally()
    source = open_source(chosen, dataset.store, plan.counts)
    tally.resume(dataset.small_rows(drafted, ["id", "status", "reason", "error"]), known)
    with Progress("collect", None, done=tally.works) as bar:
        for stored in _blocks(settings, plan, plan.blocks(source.works())):
            tally.add(stored)
            _remember(dataset, draft, done, stored)
            bar.total = None if source.expected is None else max(source.expected + plan.unforeseen, tally.works)
            bar.update(tally.works, tally.works - tally.ok)
    if not plan.listed and not known:
        left_out = ", ".join(f"{count} are {why}" for why, count in source.left_out.items()) or "it is empty"
        raise ValueError(f"{chosen.source.location} lists no work to collect ({left_out})")
    try:
        tally.judge(chosen)
    except ValueError:  # the next run asks again for the works of every block that holds a rejected one
        places = dataset.places(table for entry in done for table in entry.tables)
        bad = {place.table for place in places.values() if not place.ok}
        draft.drop(entry.tables[0] for entry in done if not bad.isdisjoint(entry.tables))
        raise
    version = _publish(dataset, began_at, done, chosen)
    draft.clear()
    ok = plan.passed_by_ok + tally.ok
    if not tally.new:
        print(f"collect: nothing new ({ok} works)", flush=True)
    seconds = time.monotonic() - began
    return {
        "stage": "collect",
        "rows_in": plan.listed,
        "rows_out": ok,
        "rejected": plan.listed - ok,
        "duplicates": len(dataset.duplicates(version)),
        "new": tally.new,
        "replaced": sum(len(entry.replaced) for entry in done),
        "skipped": plan.passed_by,
        "not_on_view": source.left_out["not on view"],
        "reasons": dict(tally.reasons),
        "seconds": seconds,
        "rows_per_s": (tally.works - tally.resumed - tally.corrected) / seconds,
    }


def _blocks(settings: Settings, plan: Any, blocks: Iterator[list[Any]]) -> Iterator[Any]:
    """Store block by block in Ray tasks; yields what was `Stored`. Each task has its share of what a host may be asked."""
    waiting = next(blocks, None)
    if waiting is None:
        return
    import ray

    from momalisa.collect.block import origins, store_block
    from momalisa.collect.hosts import HostBook
    from momalisa.collect.pace import Share
    from ray_jobs._cluster import connect
    from ray_jobs._news import SharedNews

    connect()
    chosen, book = settings.collect, HostBook()
    free = Share.among(chosen.tasks, chosen.per_host)
    news = SharedNews() if len(free) > 1 and chosen.source.kind != "folder" else None
    task: Any = ray.remote(num_cpus=settings.ray_cpus_per_task)(store_block)
    running: dict[Any, tuple[Any, set[str]]] = {}
    while waiting or running:
        while waiting and free and book.may_begin(asked := origins(filter(plan.asks, waiting), chosen)):
            share, tables = free.pop(0), {work.id: plan.known[work.id].table for work in waiting if work.id in plan.known}
            told = frozenset(work.id for work in waiting if not plan.asks(work))
            block = (settings.dataset, waiting, chosen, share, book.begin(asked), tables, told, news)
            running[task.remote(*block)] = (share, asked)
            waiting = next(blocks, None)
        finished, _ = ray.wait(list(running), num_returns=1)
        share, asked = running.pop(finished[0])
        stored = ray.get(finished[0])
        book.finish(asked, stored.figures.hosts)
        free.append(share)
        yield stored


def decisive(chosen: Collect) -> dict[str, Any]:
    """The settings that decide what a block's table holds: how fast hosts are asked is not among them, nor how we sign."""
    from momalisa.collect.robots import product

    manners = {"tasks", "per_host", "requests_per_second", "timeout_s", "attempts", "user_agent"}
    settings = chosen.model_dump(mode="json", exclude={*manners, "max_bad_fraction", "duplicates"})
    return {**settings, "robots_name": product(chosen.user_agent)}


def _remember(dataset: Any, draft: Any, done: list[Any], stored: Any) -> None:
    from momalisa.collect import validators
    from momalisa.dataset.draft import Entry

    for table, said in stored.said_again.items():
        validators.add(dataset.store, table, said)
    if stored.path or stored.told:
        done.append(Entry(stored.path, tuple(stored.replaced), tuple(stored.kept), stored.told))
        draft.add(done[-1])


def _publish(dataset: Any, began_at: Any, done: list[Any], chosen: Collect) -> Any:
    """Move `refs/latest` to a version with the new rows, without the rows that they replace; returns it."""
    from momalisa.collect import duplicates, validators
    from momalisa.dataset import Conflict
    from momalisa.dataset.corrections import Corrections
    from momalisa.records import TOLD
    from momalisa.storage import side_by_side

    replaced = {id for entry in done for id in entry.replaced}
    kept = {id for entry in done for id in entry.kept}
    tables, told = [entry.table for entry in done if entry.table], [entry.told for entry in done if entry.told]
    store, corrections = dataset.store, Corrections(side_by_side(dataset.store.get_table, told))
    moved = side_by_side(lambda table: validators.read(store, table), told)  # what was said of pictures at another address
    said = {id: one for part in moved for id, one in part.items()}

    def change(latest: Any) -> Any:
        clash = replaced & dataset.replaced(began_at, latest, ("status", "sha256", "image_url", *TOLD)) if replaced else set()
        if clash:
            raise Conflict(
                f"{store.root}: another run has replaced {len(clash)} of these works in the meantime, for example {min(clash)}; "
                f"nothing was published. Run again: what is there is passed by"
            )
        version, copies = dataset.without_works(latest, replaced, kept, corrections)

        def hand_on(old: str) -> None:
            new = {id: said[id] for id in said.keys() & dataset.ids([copies[old]])} if said else {}
            validators.add(store, copies[old], validators.read(store, old) | new)

        for _ in side_by_side(hand_on, copies):
            pass
        added = dataset.added(version, "images", tables, began_at)
        return duplicates.renewed(dataset, added, latest, chosen.duplicates)

    dataset.update(change)
    return dataset.latest()


def main() -> None:
    job(__doc__, "collect", run, said)


def said(summary: dict[str, Any]) -> str:
    instead = f" ({summary['replaced']} in place of older rows)" if summary["replaced"] else ""
    new = f"{summary['rows_out']} works, {summary['new']} new{instead}"
    counts = f"{new}, {summary['rejected']} rejected, {summary['duplicates']} duplicates"
    took = f"{counts}, {summary['not_on_view']} not on view, {summary['seconds']:.0f} s"
    return f"{took}, {summary['rows_per_s']:.1f} pictures/s" if summary["rows_per_s"] else took


if __name__ == "__main__":
    main()
