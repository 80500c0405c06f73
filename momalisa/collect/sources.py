"""Where artworks come from. A source yields `Artwork` rows without bytes: metadata, and where the picture is.

    status ""          its picture is at `image_url`: an address for `moma`, a path or gs:// address for `folder`
    status "rejected"  the source has no picture of it; `error` says so

To add a museum, write a class with `works()` and `not_on_view`, and name it in `open_source` and `config.Source.kind`.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Protocol

import fsspec

from momalisa.collect.downloader import Downloader, Fetched
from momalisa.config import Collect
from momalisa.records import REJECTED, Artwork

MAX_COLLECTION_BYTES = 1 << 30  # of a collection file; MoMA's has 69 MB
COLLECTION_TIMEOUT_S = 600.0
REQUIRED = ("ObjectID", "Title", "Artist", "ImageURL", "OnView")
MOMA_RIGHTS = "image: rights with the museum or artist; metadata: CC0"
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp"}
METADATA = ("metadata.jsonl", "metadata.csv")
TAG = re.compile(r"</?(?:em|i|b|strong|sub|sup|br)\b[^>]*>", re.IGNORECASE)


class ArtworkSource(Protocol):
    not_on_view: int  # works passed by so far because they are not on display

    def works(self) -> Iterator[Artwork]: ...


def open_source(settings: Collect) -> ArtworkSource:
    """The source that the settings name. Nothing is read yet."""
    chosen = settings.source
    return MomaFile(settings) if chosen.kind == "moma" else PictureFolder(chosen.location, chosen.limit)


class MomaFile:
    """A collection file in MoMA's CSV schema, at an http(s) or gs:// address or a path."""

    def __init__(self, settings: Collect) -> None:
        self.settings, self.source = settings, settings.source
        self.not_on_view = 0

    def works(self) -> Iterator[Artwork]:
        """Raises ValueError if the file cannot be read, is empty, or is in another schema."""
        return islice(self._works(), self.source.limit)

    def _works(self) -> Iterator[Artwork]:
        location = self.source.location
        rows = _csv_rows(read_collection(location, self.settings), location, REQUIRED)
        seen: set[str] = set()
        for row in rows:
            if self.source.on_view_only and not row["OnView"].strip('" '):
                self.not_on_view += 1
                continue
            work = _moma_work(row)
            if work.id not in seen:  # the first row of an id counts
                seen.add(work.id)
                yield work


def _moma_work(row: dict[str, str]) -> Artwork:
    problem = "" if row["ImageURL"] else "no picture"
    object_id = row["ObjectID"]
    if not object_id:
        problem, object_id = "no ObjectID", "row-" + _sha16(json.dumps(row, sort_keys=True))
    return Artwork(
        id=f"moma-{object_id}",
        status=REJECTED if problem else "",
        error=problem,
        title=plain(row["Title"]),
        artist=plain(row["Artist"]),
        date=plain(row.get("Date", "")),
        medium=plain(row.get("Medium", "")),
        classification=row.get("Classification", ""),
        department=row.get("Department", ""),
        credit=plain(row.get("CreditLine", "")),
        rights=MOMA_RIGHTS,
        url=row.get("URL", ""),
        image_url=row["ImageURL"],
    )


def plain(text: str) -> str:
    """Text on one line, without inline tags."""
    return " ".join(TAG.sub("", text).split())


def _sha16(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _csv_rows(data: bytes, location: str, required: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, cells stripped, all columns present. Raises ValueError naming the location."""
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text)
    try:
        columns = [(name or "").strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        if missing := [name for name in required if name not in columns]:
            found = ", ".join(columns[:8]) if columns and not columns[0].startswith("<") else "no such header"
            raise ValueError(
                f"{location} lacks the columns {', '.join(missing)} (found: {found[:200]}); give a CSV file in the schema of "
                f"https://github.com/MuseumofModernArt/collection, or use collect.source.kind: folder"
            )
        for row in reader:
            yield {name: (row.get(name) or "").strip() for name in columns}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{location} is not a UTF-8 CSV file (line {reader.line_num}: {error}); save it as one") from error


def read_collection(location: str, settings: Collect) -> bytes:
    """A collection file's bytes. Raises ValueError naming the location if it cannot be read or is empty."""
    data = _downloaded(location, settings) if location.startswith(("http://", "https://")) else _read(location)
    if not data.strip():
        raise ValueError(f"{location} is empty; collect.source.location must be a collection file with a header and rows")
    return data


def _downloaded(url: str, settings: Collect) -> bytes:
    # Whoever wrote the settings named this address, so it may be private; the addresses in the file may not.
    timeout_s = max(settings.timeout_s, COLLECTION_TIMEOUT_S)
    trusting = settings.model_copy(update={"allow_private_addresses": True, "timeout_s": timeout_s})
    results: list[Fetched] = []
    downloader = Downloader(trusting, per_host=1, max_bytes=MAX_COLLECTION_BYTES)
    asyncio.run(downloader.fetch_all([url], lambda _, fetched: results.append(fetched)))
    if results[0].error:
        raise ValueError(f"{url} cannot be read: {results[0].error}; check collect.source.location, or give a path to a copy")
    return results[0].data


def _read(location: str) -> bytes:
    try:
        with fsspec.open(location, "rb") as file:
            return bytes(file.read())
    except Exception as error:  # each storage has its own
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{location} cannot be read: {reason}; check collect.source.location") from error


class PictureFolder:
    """A folder or gs:// prefix of pictures, and what a metadata.jsonl or metadata.csv in it tells about them."""

    not_on_view = 0

    def __init__(self, location: str, limit: int | None = None) -> None:
        self.location, self.limit = location.rstrip("/") or "/", limit

    def works(self) -> Iterator[Artwork]:
        """Pictures in order of their paths, then files that the metadata name but are not there.

        Raises ValueError if there is no picture, or the metadata cannot be read.
        """
        return islice(self._works(), self.limit)

    def _works(self) -> Iterator[Artwork]:
        files = self._files()
        told = self._metadata(files)
        pictures = [name for name in sorted(files) if PurePosixPath(name).suffix.lower() in SUFFIXES]
        if not pictures:
            known = " ".join(sorted(SUFFIXES))
            raise ValueError(f"{self.location} holds no picture ({known}); check collect.source.location")
        for name in pictures:
            yield _folder_work(name, files[name], told.get(name, {}))
        for name in sorted(told.keys() - files.keys()):
            yield _folder_work(name, "", told[name])

    def _files(self) -> dict[str, str]:
        """Every file that is not hidden: relative path -> address."""
        try:
            fs, base = fsspec.core.url_to_fs(self.location)
            if not fs.isdir(base):
                raise FileNotFoundError("no such folder")
            found = fs.find(base)
        except Exception as error:  # each storage has its own
            raise ValueError(f"{self.location} cannot be read: {error}; check collect.source.location") from error
        prefix = base.rstrip("/") + "/"
        address = fs.unstrip_protocol if "://" in self.location else str
        names = {name.removeprefix(prefix): address(name) for name in found}
        return {name: url for name, url in names.items() if not any(part.startswith(".") for part in name.split("/"))}

    def _metadata(self, files: dict[str, str]) -> dict[str, dict[str, str]]:
        """file_name -> what is told about it."""
        name = next((name for name in METADATA if name in files), None)
        if name is None:
            return {}
        data, where = _read(files[name]), f"{self.location}/{name}"
        rows = _json_rows(data, where) if name.endswith(".jsonl") else _csv_rows(data, where, ["file_name"])
        return {str(PurePosixPath(row["file_name"])): row for row in rows if row["file_name"]}


def _json_rows(data: bytes, location: str) -> Iterator[dict[str, str]]:
    for number, line in enumerate(data.decode("utf-8-sig", "replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            file_name = row["file_name"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{location} line {number}: expected {{"file_name": "...", ...}}, found {line[:80]!r}') from error
        yield {str(key): "" if value is None else str(value) for key, value in row.items()} | {"file_name": str(file_name)}


def _folder_work(name: str, address: str, told: dict[str, str]) -> Artwork:
    facts = {key: plain(value) for key, value in told.items()}
    return Artwork(
        id=f"folder-{_sha16(name)}",
        status="" if address else REJECTED,
        error="" if address else "no picture",
        title=facts.get("title", ""),
        artist=facts.get("artist", ""),
        date=facts.get("date") or facts.get("year", ""),
        medium=facts.get("medium", ""),
        classification=facts.get("classification", ""),
        department=facts.get("department", ""),
        credit=facts.get("credit", ""),
        rights=facts.get("rights") or facts.get("licence") or facts.get("license", ""),
        url=facts.get("url", ""),
        image_url=address or name,
    )
