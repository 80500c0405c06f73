"""What `caption` and `encode` share: pictures in, a column family out, with Ray Data between a pool of model actors.

The unit is a part: the works of one images table that still lack a row. It travels as bytes,

    read (a task) -> model (an actor) -> write (a task)

so the next tables are fetched and the last ones stored while the model works. A part's batches and its table are the
same whichever actor takes it, hence a version's hash does not depend on the number of actors.
"""

from __future__ import annotations

import io
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from momalisa.config import Caption, Encode, Settings
from momalisa.dataset import Dataset
from momalisa.progress import Progress
from momalisa.records import OK
from momalisa.storage import Store, parquet_bytes

ERROR = "error"
TRANSFERS = 4  # read and write tasks at a time; they wait for the network, so they reserve no CPU


class Model(ABC):
    """What an actor holds: a model that turns pictures into rows of a family."""

    @abstractmethod
    def prepare(self, data: bytes) -> Any:
        """A picture's bytes -> a tensor; called in threads. Any exception makes this work a row with an error."""

    @abstractmethod
    def rows(self, ids: list[str], texts: list[str], prepared: list[Any]) -> list[dict[str, Any]]:
        """One batch -> one row each, in order."""

    @abstractmethod
    def failed(self, id: str, text: str, error: str) -> dict[str, Any]:
        """The row of a work that came to nothing."""


@dataclass(frozen=True)
class Family:
    """A column family to fill: its stage, settings, folder, schema, and how an actor makes its model."""

    stage: str
    settings: Caption | Encode
    folder: str
    schema: pa.Schema
    load: Callable[[str], Model]  # a device -> a model

    @property
    def device(self) -> str:
        return "cuda" if self.settings.gpus_per_actor else "cpu"


@dataclass
class Counts:
    """Rows of a family."""

    ok: int = 0
    bad: int = 0

    @property
    def all(self) -> int:
        return self.ok + self.bad


def open_picture(data: bytes) -> Image.Image:
    """Bytes -> a picture. Errors carry no memory address, so the same bad picture gives the same row."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(f"{len(data)} bytes that are no picture in a known format") from None


def open_parts(
    dataset: Dataset, images: Iterable[str], done: set[str], texts: dict[str, str] | None, exclude: Collection[str] = ()
) -> tuple[list[dict[str, str]], int]:
    """The parts still to do, and how many works there are in all.

    A work counts if its picture is `ok`, it is not to `exclude`, and, where `texts` are given, it has one; an id in two
    tables belongs to the first.
    """
    parts: list[dict[str, str]] = []
    seen: set[str] = set()
    paths = sorted(images)
    for path, rows in zip(paths, dataset.columns(paths, ["id", "status"]), strict=True):
        ids = [row["id"] for row in rows if row["status"] == OK and (texts is None or row["id"] in texts)]
        fresh = {id: texts[id] if texts else "" for id in ids if id not in seen and id not in exclude}
        seen.update(fresh)
        wanted = {id: text for id, text in fresh.items() if id not in done}
        if wanted:
            parts.append({"table": path, "wanted": json.dumps(wanted)})
    return parts, len(seen)


def fill(settings: Settings, family: Family, done_paths: tuple[str, ...], texts: dict[str, str] | None = None) -> dict[str, Any]:
    """Make the rows that a family lacks; returns the stage's summary, with the new tables' `paths`.

    Raises ValueError, and names what failed, above `max_bad_fraction`.
    """
    from ray_jobs._cluster import connect

    began, dataset = time.monotonic(), Dataset(settings.dataset)
    counts, done = Counts(), set()
    version = dataset.latest()
    exclude = {row["id"] for row in dataset.rows(version.duplicates, ["id"])}
    for row in (row for rows in dataset.columns(done_paths, ["id", "status"]) for row in rows):
        if row["id"] in exclude:
            continue
        done.add(row["id"])
        counts.ok += row["status"] == OK
        counts.bad += row["status"] != OK
    before = counts.all
    parts, total = open_parts(dataset, version.images, done, texts, exclude)
    paths: list[str] = []
    if parts:
        connect()
        paths = _stream(settings, family, parts, counts, total)
    seconds = time.monotonic() - began
    return {
        "stage": family.stage,
        "rows_in": total,
        "rows_out": counts.ok,
        "rejected": counts.bad,
        "new": counts.all - before,
        "skipped": before,
        "duplicates": len(exclude),
        "seconds": seconds,
        "rows_per_s": (counts.all - before) / seconds,
        "paths": paths,
    }


def _stream(settings: Settings, family: Family, parts: list[dict[str, str]], counts: Counts, total: int) -> list[str]:
    """Run the parts through the pool; returns the tables' paths."""
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    _quiet()
    chosen, store = family.settings, Store(settings.dataset)
    if chosen.gpus_per_actor > ray.cluster_resources().get("GPU", 0):
        print(f"{family.stage}: waiting for a node with a GPU: each actor wants {chosen.gpus_per_actor:g}", flush=True)
    transfer: dict[str, Any] = {"num_cpus": 0, "compute": TaskPoolStrategy(size=min(TRANSFERS, len(parts)))}
    actor: dict[str, Any] = {"num_cpus": chosen.cpus_per_actor, "num_gpus": chosen.gpus_per_actor or None}
    model: Any = _Actor
    stream = (
        ray.data.from_items(parts, override_num_blocks=len(parts))
        .map(partial(_read, store=store), **transfer)
        .map(model, fn_constructor_args=(family,), compute=ActorPoolStrategy(size=min(chosen.actors, len(parts))), **actor)
        .map(partial(_write, store=store, folder=family.folder), **transfer)
    )
    paths, errors = [], []
    with Progress(family.stage, total, done=counts.all, rejected="failed") as bar:
        for row in stream.iter_rows():
            paths.append(row["path"])
            errors += json.loads(row["errors"])
            counts.ok += row["ok"]
            counts.bad += row["bad"]
            bar.update(counts.all, counts.bad)
    if counts.bad > chosen.max_bad_fraction * counts.all:
        raise ValueError(
            f"{family.stage}: {counts.bad} of {counts.all} works failed, more than max_bad_fraction={chosen.max_bad_fraction:g}; "
            f"nothing was published. {'; '.join(errors[:3])}"
        )
    return paths


def _quiet() -> None:
    """No bars of Ray Data's beside ours; its logs only from warnings on."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _read(part: dict[str, Any], store: Store) -> dict[str, Any]:
    return {"wanted": part["wanted"], "data": store.read_bytes(part["table"])}


def _write(part: dict[str, Any], store: Store, folder: str) -> dict[str, Any]:
    path = store.put_table(folder, pq.read_table(io.BytesIO(part["data"])))
    return {"path": path, "ok": part["ok"], "bad": part["bad"], "errors": part["errors"]}


class _Actor:
    """One process of the pool: it holds a model and makes a part's rows."""

    def __init__(self, family: Family) -> None:
        import torch

        threads = max(1, int(family.settings.cpus_per_actor))
        torch.set_num_threads(threads)
        self.family, self.model = family, family.load(family.device)
        self.threads = ThreadPoolExecutor(threads)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        texts: dict[str, str] = json.loads(part["wanted"])
        rows = sorted(self.rows(texts, part["data"]), key=lambda row: str(row["id"]))
        bad = [f"{row['id']}: {row['error']}" for row in rows if row["status"] != OK]
        table = pa.Table.from_pylist(rows, schema=self.family.schema)
        return {"data": parquet_bytes(table), "ok": len(rows) - len(bad), "bad": len(bad), "errors": json.dumps(bad[:3])}

    def rows(self, texts: dict[str, str], data: bytes) -> list[dict[str, Any]]:
        """The rows of the wanted works of an images table; pictures are decoded in threads while the model works."""
        works = pq.read_table(io.BytesIO(data), columns=["id", "bytes"], filters=[("id", "in", list(texts))]).to_pylist()
        works = sorted(({work["id"]: work for work in works}).values(), key=lambda work: str(work["id"]))
        futures = [(work["id"], self.threads.submit(self.model.prepare, work["bytes"])) for work in works]
        rows, ids, prepared = [], [], []
        for position, (id, future) in enumerate(futures, start=1):
            if (error := future.exception()) is None:
                ids.append(id)
                prepared.append(future.result())
            else:
                rows.append(self.model.failed(id, texts[id], f"{type(error).__name__}: {error}"))
            if ids and (len(ids) == self.family.settings.batch or position == len(futures)):
                rows += self.model.rows(ids, [texts[id] for id in ids], prepared)
                ids, prepared = [], []
        return rows
