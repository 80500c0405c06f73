"""One block of works: fetch their pictures, clean them, fill in the rows, and store what is new as one table."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import fsspec
import pyarrow as pa

from momalisa.collect import validators
from momalisa.collect.downloader import Downloader
from momalisa.collect.fetched import Fetched, Validators
from momalisa.collect.hosts import Hosts, origin_of
from momalisa.collect.hygiene import BadPicture, clean
from momalisa.collect.news import News
from momalisa.collect.pace import Share
from momalisa.collect.sources.text import legible
from momalisa.config import Collect
from momalisa.dataset import Dataset
from momalisa.records import CORRECTIONS, DETAILS, IMAGES, OK, REJECTED, TOLD, Artwork, Reason
from momalisa.storage import in_bucket, options, retried

OPEN_FILES = 8  # of a folder or a bucket, read at a time
FACTS = ["id", "status", "error", "reason", "sha256", "image_url"]


@dataclass(frozen=True)
class Before:
    """What the dataset holds of a work that is asked for again."""

    table: str
    status: str
    error: str
    reason: str
    sha256: str
    image_url: str
    told: dict[str, str]  # the row's TOLD
    said: Validators  # by the host, about this picture


@dataclass
class Figures:
    """How a block's works ended, and what was learned about hosts."""

    ok: int = 0  # works whose row, new or old, is usable
    bad_before: int = 0  # works that were rejected before, and are
    corrected: int = 0  # of those that are ok, works whose picture was not asked for
    reasons: Counter[str] = field(default_factory=Counter)  # of the rejected and the unchanged
    examples: dict[str, str] = field(default_factory=dict)  # reason -> an error
    hosts: Hosts = field(default_factory=Hosts)


@dataclass
class Collected:
    """What a block came to. Rows are only those that the dataset lacks or must replace."""

    rows: list[Artwork] = field(default_factory=list)
    retold: list[Artwork] = field(default_factory=list)  # corrections: their pictures stay, and are not in these rows
    kept: set[str] = field(default_factory=set)  # ids of the retold whose captions hold: DETAILS are as they were
    said: dict[str, Validators] = field(default_factory=dict)  # id -> what the host said about the rows' pictures, if it is new
    said_again: dict[str, Validators] = field(default_factory=dict)  # the same, of pictures that have not changed
    figures: Figures = field(default_factory=Figures)


@dataclass(frozen=True)
class Stored:
    """A block in the dataset: its tables' paths ("" of nothing new, nothing told otherwise), which works have a new row, and its
    figures."""

    path: str
    told: str
    works: int
    new: int
    replaced: frozenset[str]  # ids of rows that the new tables' rows stand in for
    kept: frozenset[str]  # of these, works whose captions and latents stay
    said_again: dict[str, dict[str, Validators]]  # images table -> id -> validators
    figures: Figures


def store_block(
    dataset: str,
    works: Sequence[Artwork],
    settings: Collect,
    share: Share,
    hosts: Hosts,
    tables: Mapping[str, str],
    told: Set[str] = frozenset(),
    news: News | None = None,
) -> Stored:
    """Collect a block and write it below `dataset`; nobody reads it before it is published.

    `tables`: id -> images table, of works that are there; `told`: ids of those whose picture is not asked for.
    """
    store = Dataset(dataset)
    before = read_before(store, tables)
    collected = collect_block(works, settings, share, hosts, before, told, news)
    path = _put(store, "images", collected.rows, IMAGES, collected.said)
    retold = _put(store, "corrections", collected.retold, CORRECTIONS, collected.said)
    again: dict[str, dict[str, Validators]] = {}
    for id, said in collected.said_again.items():
        again.setdefault(before[id].table, {})[id] = said
    ids, kept = frozenset(row.id for row in (*collected.rows, *collected.retold)), frozenset(collected.kept)
    return Stored(path, retold, len(works), len(ids), ids & before.keys(), kept, again, collected.figures)


def _put(store: Dataset, folder: str, rows: list[Artwork], schema: pa.Schema, said: Mapping[str, Validators]) -> str:
    """Write a table, and beside it what hosts said about its works' pictures; returns its path, "" of no rows."""
    if not rows:
        return ""
    path = store.put_rows(folder, [row.row() for row in rows], schema)
    validators.add(store.store, path, {row.id: said[row.id] for row in rows if row.id in said})
    return path


def read_before(dataset: Dataset, tables: Mapping[str, str]) -> dict[str, Before]:
    """id -> what the dataset holds of it. `tables`: id -> images table."""
    before = {}
    for table, rows in dataset.small_tables(set(tables.values()), [*FACTS, *TOLD]):
        said = validators.read(dataset.store, table)
        for row in rows.to_pylist():
            if tables.get(id := row.pop("id")) == table:
                told = {name: row.pop(name) for name in TOLD}
                before[id] = Before(table, **row, told=told, said=said.get(id, Validators()))
    return before


def collect_block(
    works: Sequence[Artwork],
    settings: Collect,
    share: Share | None = None,
    hosts: Hosts | None = None,
    before: Mapping[str, Before] | None = None,
    told: Set[str] = frozenset(),
    news: News | None = None,
) -> Collected:
    """The works, each with its clean picture or the reason why not, in order; those that the source rejected pass unchanged.

    Of works that are there `before`, only what has changed is a row; the pictures of those in `told` are not asked for.
    """
    before = before or {}
    rows, fetched = list(works), [Fetched()] * len(works)
    wanted = [index for index, work in enumerate(works) if work.status != REJECTED and work.id not in told]

    def finish(place: int, one: Fetched) -> None:
        index = wanted[place]
        fetched[index] = replace(one, data=b"")
        old = before.get(works[index].id)
        if one.reason != Reason.NOT_MODIFIED and not (old and _same_picture(one, old)):
            rows[index] = finished(works[index], one, settings)

    addresses = [works[index].image_url for index in wanted]
    learned = hosts or Hosts()
    if settings.source.kind == "folder":
        _read_all(addresses, settings, finish)
    else:
        downloader = Downloader(settings, share, hosts, news)
        known = [_known(before.get(works[index].id), works[index]) for index in wanted]
        asyncio.run(downloader.fetch_all(addresses, finish, known))
        learned = downloader.hosts
    collected = Collected(figures=Figures(hosts=learned))
    for row, one in zip(rows, fetched, strict=True):
        if row.id in told:
            _stay(collected.figures, old := before[row.id])
            collected.figures.corrected += old.status == OK
            _retell(collected, replace(row, image_url=old.image_url), old, old.said)
        else:
            _sort_in(collected, row, one, before.get(row.id))
    return collected


def _known(old: Before | None, work: Artwork) -> Validators:
    """What to say to the host; nothing if the picture has moved, for validators belong to an address."""
    return old.said if old and old.status == OK and old.image_url == work.image_url else Validators()


def _same_picture(one: Fetched, old: Before) -> bool:
    return one.reason == Reason.OK and old.status == OK and hashlib.sha256(one.data).hexdigest() == old.sha256


def _sort_in(collected: Collected, row: Artwork, one: Fetched, old: Before | None) -> None:
    """Count a work, and keep its row if the dataset lacks it or holds another one."""
    figures, unchanged = collected.figures, row.status == ""  # its picture is the one that is there
    if unchanged:
        figures.reasons[Reason.NOT_MODIFIED] += 1
    elif row.status != OK:
        figures.reasons[row.reason] += 1
        figures.examples.setdefault(row.reason, row.error)
    if old is None or not (unchanged or _stays(old, row)):
        figures.ok += row.status == OK
        figures.bad_before += row.status != OK and old is not None and old.status != OK
        collected.rows.append(row)
        if one.validators:
            collected.said[row.id] = one.validators
        return
    _stay(figures, old)
    sent = unchanged and one.reason == Reason.OK  # by the address that the source names now
    now = row if sent else replace(row, image_url=old.image_url)
    retold = _retell(collected, now, old, one.validators if sent else old.said)
    if not retold and unchanged and one.validators and one.validators != old.said:
        collected.said_again[row.id] = one.validators


def _stay(figures: Figures, old: Before) -> None:
    figures.ok += old.status == OK
    figures.bad_before += old.status != OK


def _retell(collected: Collected, row: Artwork, old: Before, said: Validators) -> bool:
    """Of a work whose picture stays, keep what is told now if that is something else; returns whether it is."""
    if old.told == _told(row) and old.image_url == row.image_url:
        return False
    collected.retold.append(replace(row, status=old.status, error=old.error, reason=old.reason))
    if said != old.said:
        collected.said[row.id] = said
    if all(old.told[name] == getattr(row, name) for name in DETAILS):
        collected.kept.add(row.id)
    return True


def _told(row: Artwork) -> dict[str, str]:
    return {name: getattr(row, name) for name in TOLD}


def _stays(old: Before, row: Artwork) -> bool:
    """Whether the old picture stands: a good one that cannot be had today stays, unless its host no longer allows it."""
    if row.status == OK:
        return False
    if old.status == OK:
        return row.reason != Reason.DISALLOWED
    return (old.reason, old.error, old.image_url, old.told) == (row.reason, row.error, row.image_url, _told(row))


def finished(work: Artwork, fetched: Fetched, settings: Collect) -> Artwork:
    """A work with what came of its picture."""
    if fetched.reason != Reason.OK:
        return replace(work, status=REJECTED, error=legible(fetched.error), reason=fetched.reason)
    sha256 = hashlib.sha256(fetched.data).hexdigest()
    try:
        picture = clean(fetched.data, settings)
    except BadPicture as error:
        return replace(work, status=REJECTED, error=str(error), reason=Reason.NOT_A_PICTURE, sha256=sha256)
    return replace(work, status=OK, reason=Reason.OK, sha256=sha256, **vars(picture))


def _read_all(addresses: Sequence[str], settings: Collect, then: Callable[[int, Fetched], None]) -> None:
    with ThreadPoolExecutor(OPEN_FILES) as pool:
        list(pool.map(lambda place: then(place, read_file(addresses[place], settings.max_bytes)), range(len(addresses))))


def read_file(address: str, max_bytes: int) -> Fetched:
    """A picture of a folder or bucket."""

    def read() -> bytes:
        with fsspec.open(address, "rb", **options(address)) as file:
            return bytes(file.read(max_bytes + 1))

    try:
        data = retried(read) if in_bucket(address) else read()
    except Exception as error:  # each storage has its own
        reason = Reason.NOT_FOUND if isinstance(error, FileNotFoundError) else Reason.UNREACHABLE
        return Fetched(error=f"{type(error).__name__}: {error}", reason=reason)
    if len(data) > max_bytes:
        return Fetched(error=f"more bytes than max_bytes={max_bytes}", reason=Reason.TOO_LARGE)
    return Fetched(data=data)


def origins(works: Iterable[Artwork], settings: Collect) -> set[str]:
    """The hosts whose robots.txt a block needs."""
    if settings.source.kind == "folder" or not settings.obey_robots:
        return set()
    return {origin for work in works if work.status != REJECTED and (origin := origin_of(work.image_url))}
