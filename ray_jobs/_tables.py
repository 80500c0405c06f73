"""What `caption` and `encode` share: pictures in, a column family out, with Ray Data between a pool of model actors.

The unit is a part: the works of one images table that still lack a row. It travels as bytes,

    read (a task) -> decode (a task on a CPU) -> model (an actor) -> write (a task)

so the next tables are fetched and decoded and the last ones stored while the model works. A part's batches and its
table are the same whichever process takes it, hence a version's hash does not depend on the number of actors.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.parquet as pq

from momalisa import family as families
from momalisa.config import Settings
from momalisa.dataset import Dataset
from momalisa.dataset.draft import Draft, Entry
from momalisa.family import Family
from momalisa.progress import Progress
from momalisa.records import OK
from momalisa.storage import Store

AHEAD_BYTES = 192 << 20  # of parts that wait for an actor: a few full ones, whatever the collection's size
TRANSFERS = 4  # read and write tasks at a time; they wait for the network, so they reserve no CPU


@dataclass
class Counts:
    """Rows of a family, and the seconds that decoding tasks and models were busy with new ones."""

    ok: int = 0
    bad: int = 0
    decode_s: float = 0.0
    model_s: float = 0.0

    @property
    def all(self) -> int:
        return self.ok + self.bad


def open_parts(
    dataset: Dataset, images: Iterable[str], done: set[str], texts: dict[str, str] | None, exclude: Collection[str] = ()
) -> tuple[list[dict[str, str]], int]:
    """The parts still to do, and how many works there are in all.

    A work counts if its picture is `ok`, it is not to `exclude`, and, where `texts` are given, it has one; an id in two
    tables belongs to the first.
    """
    parts: list[dict[str, str]] = []
    seen: set[str] = set()
    for path, table in dataset.small_tables(images, ["id", "status"]):
        ids = [row["id"] for row in table.to_pylist() if row["status"] == OK and (texts is None or row["id"] in texts)]
        fresh = {id: texts[id] if texts else "" for id in ids if id not in seen and id not in exclude}
        seen.update(fresh)
        wanted = {id: text for id, text in fresh.items() if id not in done}
        if wanted:
            parts.append({"table": path, "wanted": json.dumps(wanted)})
    return parts, len(seen)


def fill(settings: Settings, family: Family, done_paths: tuple[str, ...], texts: dict[str, str] | None = None) -> dict[str, Any]:
    """Make the rows that a family lacks; returns the stage's summary, with the new tables' `paths` and the `draft` to clear
    once they are published.

    Raises ValueError, and names what failed, above `max_bad_fraction`.
    """
    from ray_jobs._cluster import connect

    began, dataset = time.monotonic(), Dataset(settings.dataset)
    counts, done = Counts(), set()
    version = dataset.latest()
    exclude = dataset.duplicates(version)
    for row in dataset.small_rows(done_paths, ["id", "status"]):
        if row["id"] in exclude:
            continue
        done.add(row["id"])
        counts.ok += row["status"] == OK
        counts.bad += row["status"] != OK
    before = counts.all
    draft = Draft(dataset.store, family.folder.replace("/", "-"), version.sha256[:16])
    paths = [entry.table for entry in draft.entries()]  # of a run that was interrupted
    for row in dataset.small_rows(paths, ["id", "status"]):
        done.add(row["id"])
        counts.ok += row["status"] == OK
        counts.bad += row["status"] != OK
    there = counts.all
    if paths:
        print(f"{family.stage}: going on after {there - before} works of a run that was interrupted", flush=True)
    tables, total = open_parts(dataset, version.images, done, texts, exclude)
    parts = [part for table in tables for part in families.split(table)]
    if parts:
        connect()
        paths += _stream(settings, family, parts, counts, total, draft)
    if paths and counts.bad > family.settings.max_bad_fraction * counts.all:
        raise ValueError(_too_bad(family, dataset, draft, [*paths, *done_paths], counts))
    made, seconds = counts.all - there, time.monotonic() - began
    return {
        "stage": family.stage,
        "rows_in": total,
        "rows_out": counts.ok,
        "rejected": counts.bad,
        "new": counts.all - before,
        "skipped": before,
        "duplicates": len(exclude),
        "seconds": seconds,
        "rows_per_s": rate(made, seconds),
        "pictures_per_s": {"one_decoder": rate(made, counts.decode_s), "one_actor": rate(made, counts.model_s)},
        "paths": paths,
        "draft": draft,
    }


def _too_bad(family: Family, dataset: Dataset, draft: Draft, paths: Iterable[str], counts: Counts) -> str:
    """What to say above `max_bad_fraction`. The draft forgets the tables that hold a failed work, so they are made again."""
    tables = dataset.small_tables(paths, ["id", "status", "error"])
    failed = [(path, row) for path, table in tables for row in table.to_pylist() if row["status"] != OK]
    draft.drop({path for path, _ in failed})
    errors = "; ".join(f"{row['id']}: {row['error']}" for _, row in failed[:3])
    return (
        f"{family.stage}: {counts.bad} of {counts.all} works failed, more than "
        f"max_bad_fraction={family.settings.max_bad_fraction:g}; nothing was published. {errors}. "
        f"Running again tries them once more"
    )


def rate(count: int, seconds: float) -> float:
    return count / seconds if count else 0.0


def decoder_cpus(family: Family, parts: int, cpus: float) -> float:
    """What a decoding task reserves of a cluster with so many CPUs.

    Nothing where the actors leave less than it wants: it would wait for ever, so it shares their CPUs.
    """
    chosen = family.settings
    left = cpus - min(chosen.actors, parts) * chosen.cpus_per_actor
    return chosen.cpus_per_decoder if left >= chosen.cpus_per_decoder else 0.0


def _stream(
    settings: Settings, family: Family, parts: list[dict[str, str]], counts: Counts, total: int, draft: Draft
) -> list[str]:
    """Run the parts through the pool; returns the tables' paths."""
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    chosen, store, have = family.settings, Store(settings.dataset), ray.cluster_resources()
    _configure(AHEAD_BYTES * chosen.actors)
    reserved = decoder_cpus(family, len(parts), have.get("CPU", 0))
    if chosen.gpus_per_actor > have.get("GPU", 0):
        print(f"{family.stage}: waiting for a node with a GPU: each actor wants {chosen.gpus_per_actor:g}", flush=True)
        reserved = chosen.cpus_per_decoder  # that node brings CPUs too
    transfer: dict[str, Any] = {"num_cpus": 0, "compute": TaskPoolStrategy(size=min(TRANSFERS, len(parts)))}
    decoder: dict[str, Any] = {"num_cpus": reserved, "compute": TaskPoolStrategy(size=len(parts))} if reserved else transfer
    actor: dict[str, Any] = {"num_cpus": chosen.cpus_per_actor, "num_gpus": chosen.gpus_per_actor or None}
    model: Any = _Actor
    stream = (
        ray.data.from_items(parts, override_num_blocks=len(parts))
        .map(partial(_read, store=store), **transfer)
        .map(partial(families.decode, squares=family.squares, columns=family.columns), **decoder)
        .map(model, fn_constructor_args=(family,), compute=ActorPoolStrategy(size=min(chosen.actors, len(parts))), **actor)
        .map(partial(_write, store=store, folder=family.folder, draft=draft), **transfer)
    )
    paths = []
    with Progress(family.stage, total, done=counts.all, rejected="failed") as bar:
        for row in stream.iter_rows():
            paths.append(row["path"])
            counts.ok += row["ok"]
            counts.bad += row["bad"]
            counts.decode_s += row["decode_s"]
            counts.model_s += row["model_s"]
            bar.update(counts.all, counts.bad)
    return paths


def _configure(ahead_bytes: int) -> None:
    """So many bytes between tasks at most; no bars of Ray Data's beside ours; its logs only from warnings on."""
    from ray.data import DataContext, ExecutionResources

    context = DataContext.get_current()
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=ahead_bytes)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _read(part: dict[str, Any], store: Store) -> dict[str, Any]:
    return {"wanted": part["wanted"], "data": store.read_bytes(part["table"])}


def _write(part: dict[str, Any], store: Store, folder: str, draft: Draft) -> dict[str, Any]:
    """Store a table and remember it at once: the driver hears of it later, and may be gone by then."""
    path = store.put_table(folder, pq.read_table(io.BytesIO(part.pop("data"))))
    draft.add(Entry(path))
    return {"path": path, **part}


class _Actor:
    """One process of the pool: it holds a model and makes a part's rows."""

    def __init__(self, family: Family) -> None:
        import torch

        torch.set_num_threads(max(1, int(family.settings.cpus_per_actor)))
        self.family, self.model = family, family.load(family.device)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        return families.fill(part, self.family, self.model)
