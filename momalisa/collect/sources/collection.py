"""A collection file, read as it streams by: a path, a gs:// address, or an http(s) address by way of a temporary file."""

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
from momalisa.collect.sources.access import unreadable
from momalisa.config import Collect
from momalisa.records import Reason

MAX_COLLECTION_BYTES = 4 << 30  # of a collection file; MoMA's has 69 MB
COLLECTION_TIMEOUT_S = 600.0


@contextmanager
def opened(location: str, settings: Collect) -> Iterator[BinaryIO]:
    """A collection file's bytes. Raises ValueError naming the location if it cannot be read."""
    if location.startswith(("http://", "https://")):
        with tempfile.TemporaryFile(prefix="momalisa-") as file:
            _download(location, settings, file)
            file.seek(0)
            yield file
        return
    try:
        file = fsspec.open(location, "rb").open()
    except Exception as error:  # each storage has its own
        raise unreadable(location, error) from error
    with file:
        yield file


def _download(url: str, settings: Collect, file: BinaryIO) -> None:
    # Whoever wrote the settings named this address, so it may be private; the addresses in the file may not.
    timeout_s = max(settings.timeout_s, COLLECTION_TIMEOUT_S)
    trusting = settings.model_copy(update={"allow_private_addresses": True, "timeout_s": timeout_s})
    fetched = asyncio.run(Downloader(trusting).save(url, file, MAX_COLLECTION_BYTES))
    if fetched.reason != Reason.OK:
        raise ValueError(f"{url} cannot be read: {fetched.error}; check collect.source.location, or give a path to a copy")


def csv_rows(file: BinaryIO, location: str, required: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, cells stripped, all columns present. Raises ValueError naming the location."""
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text)
        try:
            yield from _rows(reader, location, required)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{location} is not a UTF-8 CSV file (line {reader.line_num}: {error}); save it as one") from error


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
