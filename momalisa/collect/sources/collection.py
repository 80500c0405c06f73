"""A collection file, read as it streams by: a path, or a gs:// or http(s) address by way of a temporary file."""

from __future__ import annotations

import asyncio
import csv
import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import fsspec

from momalisa.collect.downloader import Downloader
from momalisa.collect.fetched import NOTHING_SAID
from momalisa.collect.sources.access import unreadable
from momalisa.collect.sources.copies import Copy
from momalisa.config import Collect
from momalisa.records import Reason
from momalisa.storage import Store, copy_out, in_bucket, options, retried

MAX_COLLECTION_BYTES = 4 << 30  # of a collection file; MoMA's has 69 MB
COLLECTION_TIMEOUT_S = 600.0


@contextmanager
def opened(location: str, settings: Collect, beside: Store | None = None) -> Iterator[BinaryIO]:
    """A collection file's bytes. Raises ValueError naming the location if it cannot be read.

    `beside`: the dataset's store, where a copy is kept of what comes over http(s), so that it is fetched when it has changed.
    """
    if not location.startswith(("http://", "https://")) and not in_bucket(location):
        with _local(location) as file:
            yield file
        return
    with tempfile.TemporaryFile(prefix="momalisa-") as file:
        if in_bucket(location):
            _copy(location, file)
        else:
            _download(location, settings, file, beside)
        file.seek(0)
        yield file


def _local(location: str) -> BinaryIO:
    try:
        file: BinaryIO = fsspec.open(location, "rb").open()
    except Exception as error:  # each storage has its own
        raise unreadable(location, error) from error
    return file


def _copy(location: str, file: BinaryIO) -> None:
    fs, path = fsspec.core.url_to_fs(location, use_listings_cache=False, **options(location))
    try:
        copy_out(fs, path, file, retried)
    except Exception as error:  # each storage has its own
        raise unreadable(location, error) from error


def _download(url: str, settings: Collect, file: BinaryIO, beside: Store | None) -> None:
    # Whoever wrote the settings named this address, so it may be private; the addresses in the file may not.
    timeout_s = max(settings.timeout_s, COLLECTION_TIMEOUT_S)
    trusting = settings.model_copy(update={"allow_private_addresses": True, "timeout_s": timeout_s})
    copy = Copy(beside, url) if beside else None
    known = copy.said if copy else NOTHING_SAID
    fetched = asyncio.run(Downloader(trusting).save(url, file, MAX_COLLECTION_BYTES, known))
    if copy and fetched.reason == Reason.NOT_MODIFIED:
        copy.read(file)
    elif fetched.reason != Reason.OK:
        raise ValueError(f"{url} cannot be read: {fetched.error}; check collect.source.location, or give a path to a copy")
    elif copy:
        copy.keep(file, fetched.validators)


def csv_rows(file: BinaryIO, location: str, required: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, cells stripped, all columns present; the file stays open. Raises ValueError naming the location."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text)
    try:
        yield from _rows(reader, location, required)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{location} is not a UTF-8 CSV file (line {reader.line_num}: {error}); save it as one") from error
    finally:
        text.detach()


def _rows(reader: Iterator[list[str]], location: str, required: Iterable[str]) -> Iterator[dict[str, str]]:
    columns = [name.strip() for name in next((row for row in reader if any(map(str.strip, row))), [])]
    if not columns:
        raise ValueError(f"{location} is empty; collect.source.location must be a collection file with a header and rows")
    if missing := [name for name in required if name not in columns]:
        raise _in_another_schema(location, columns, missing)
    for row in reader:
        if row:
            cells = row + [""] * (len(columns) - len(row))
            yield dict(zip(columns, map(str.strip, cells), strict=False))


def _in_another_schema(location: str, columns: list[str], missing: list[str]) -> ValueError:
    found = ", ".join(columns[:8]) if not columns[0].startswith("<") else "no such header"
    return ValueError(
        f"{location} lacks the columns {', '.join(missing)} (found: {found[:200]}); give a CSV file in the schema of "
        f"https://github.com/MuseumofModernArt/collection, or use collect.source.kind: folder"
    )
