"""One block of works: fetch their pictures, clean them, fill in the rows, and store them as one table."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import fsspec

from momalisa.collect.downloader import Downloader, Fetched
from momalisa.collect.hygiene import BadPicture, clean
from momalisa.config import Collect
from momalisa.dataset import Dataset
from momalisa.records import IMAGES, OK, REJECTED, Artwork

READERS = 8  # files of a folder read at a time


@dataclass(frozen=True)
class Stored:
    """A block in the dataset: its table's path, its works, how often each error occurred, and hosts that have said no."""

    path: str
    works: int
    errors: Counter[str]
    blocked: set[str]


def store_block(dataset: str, works: Sequence[Artwork], settings: Collect, per_host: int, blocked: Iterable[str] = ()) -> Stored:
    """Collect a block and write it below `dataset`; nobody reads it before it is published."""
    rows, refused = collect_block(works, settings, per_host, blocked)
    path = Dataset(dataset).put_rows("images", [row.row() for row in rows], IMAGES)
    return Stored(path, len(rows), Counter(row.error for row in rows if row.status != OK), refused)


def collect_block(
    works: Sequence[Artwork], settings: Collect, per_host: int, blocked: Iterable[str] = ()
) -> tuple[list[Artwork], set[str]]:
    """The works, each with its clean picture or the reason why not, in order; and the hosts that have said no.

    `per_host`: connections to one host at a time. Works that the source rejected pass unchanged.
    """
    rows = list(works)
    wanted = [index for index, work in enumerate(rows) if work.status != REJECTED]

    def finish(place: int, fetched: Fetched) -> None:
        index = wanted[place]
        rows[index] = finished(rows[index], fetched, settings)

    addresses = [rows[index].image_url for index in wanted]
    if settings.source.kind == "folder":
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda place: finish(place, read_file(addresses[place], settings.max_bytes)), range(len(wanted))))
        return rows, set()
    downloader = Downloader(settings, per_host, blocked)
    asyncio.run(downloader.fetch_all(addresses, finish))
    return rows, downloader.blocked


def finished(work: Artwork, fetched: Fetched, settings: Collect) -> Artwork:
    """A work with what came of its picture."""
    if fetched.error:
        return replace(work, status=REJECTED, error=fetched.error)
    sha256 = hashlib.sha256(fetched.data).hexdigest()
    try:
        picture = clean(fetched.data, settings)
    except BadPicture as error:
        return replace(work, status=REJECTED, error=str(error), sha256=sha256)
    return replace(work, status=OK, sha256=sha256, **vars(picture))


def read_file(address: str, max_bytes: int) -> Fetched:
    """A picture of a folder or bucket."""
    try:
        with fsspec.open(address, "rb") as file:
            data = bytes(file.read(max_bytes + 1))
    except Exception as error:  # each storage has its own
        return Fetched(error=f"{type(error).__name__}: {error}")
    if len(data) > max_bytes:
        return Fetched(error=f"more bytes than max_bytes={max_bytes}")
    return Fetched(data=data)
