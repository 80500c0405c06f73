"""A folder or gs:// prefix of pictures, and what a metadata.jsonl or metadata.csv in it tells about them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

from momalisa.collect.sources.access import unreadable
from momalisa.collect.sources.collection import csv_rows, opened
from momalisa.collect.sources.listing import NO_PICTURE, listed
from momalisa.collect.sources.selection import Wanted, selected
from momalisa.collect.sources.text import plain
from momalisa.config import Collect
from momalisa.records import Artwork
from momalisa.storage import in_bucket, options, retried

SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp"}
METADATA = ("metadata.jsonl", "metadata.csv")


class PictureFolder:
    """Pictures below a path or a gs:// prefix. Their names and metadata are held in memory, the pictures are not."""

    def __init__(self, settings: Collect, wanted: Wanted | None = None) -> None:
        self.settings, self.source, self.wanted = settings, settings.source, wanted
        self.expected: int | None = None
        self.location = settings.source.location.rstrip("/") or "/"
        self.left_out: Counter[str] = Counter()

    def works(self) -> Iterator[Artwork]:
        """Pictures in order of their paths, then files that the metadata name but are not there.

        Raises ValueError if there is no picture, or the metadata cannot be read.
        """
        return selected(((work, True) for work in self._works()), self.source, self.left_out, distinct=True)

    def _works(self) -> Iterator[Artwork]:
        names = self._names()
        told = self._metadata(names)
        if not any(map(_is_picture, names)):
            known = " ".join(sorted(SUFFIXES))
            raise ValueError(f"{self.location} holds no picture ({known}); check collect.source.location")
        if self.wanted is not None:
            pictures = itertools.islice(filter(_is_picture, names), self.source.limit)
            self.expected = sum(self.wanted(_id(name)) for name in pictures)
        for name in names:
            facts = told.pop(name, {})
            if _is_picture(name):
                yield _work(name, f"{self.location.rstrip('/')}/{name}", facts)
        for name in sorted(told):
            yield _work(name, "", told[name])

    def _names(self) -> list[str]:
        """Every file that is not hidden, by its path below the location, sorted."""
        try:
            found = self._in_bucket() if in_bucket(self.location) else self._in_folder()
            return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))
        except Exception as error:  # each storage has its own
            raise unreadable(self.location, error) from error

    def _in_bucket(self) -> Iterator[str]:
        """Page by page, and nothing but names is asked for: `find` of gcsfs holds all that is known of each object."""
        fs, base = fsspec.core.url_to_fs(self.location, **options(self.location))
        bucket, _, prefix = base.partition("/")
        below, token = f"{prefix}/" if prefix else "", ""
        asked = {"prefix": below, "fields": "items(name),nextPageToken", "json_out": True}
        while True:
            page = retried(partial(fs.call, "GET", "b/{}/o", bucket, pageToken=token or None, **asked))
            yield from (item["name"].removeprefix(below) for item in page.get("items", []))
            if not (token := page.get("nextPageToken", "")):
                return

    def _in_folder(self) -> Iterator[str]:
        """Folder by folder, so that of a million files only the names are held."""
        if not Path(self.location).is_dir():
            raise FileNotFoundError(self.location)
        for folder, _, files in os.walk(self.location):
            below = Path(folder).relative_to(self.location)
            yield from ((below / name).as_posix() for name in files)

    def _metadata(self, names: list[str]) -> dict[str, dict[str, str]]:
        """file_name -> what is told about it."""
        name = next((name for name in METADATA if name in names), None)
        if name is None:
            return {}
        where = f"{self.location}/{name}"
        with opened(where, self.settings) as file:
            rows = _json_rows(file, where) if name.endswith(".jsonl") else csv_rows(file, where, ["file_name"])
            return {str(PurePosixPath(row["file_name"])): row for row in rows if row["file_name"]}


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _json_rows(file: BinaryIO, location: str) -> Iterator[dict[str, str]]:
    for number, data in enumerate(file, 1):
        line = data.decode("utf-8-sig", "replace")
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            file_name = row["file_name"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{location} line {number}: expected {{"file_name": "...", ...}}, found {line[:80]!r}') from error
        yield {str(key): "" if value is None else str(value) for key, value in row.items()} | {"file_name": str(file_name)}


def _id(name: str) -> str:
    return f"folder-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _work(name: str, address: str, told: dict[str, str]) -> Artwork:
    facts = {key: plain(value) for key, value in told.items()}
    return listed(
        _id(name),
        address or name,
        "" if address else NO_PICTURE,
        title=facts.get("title", ""),
        artist=facts.get("artist", ""),
        date=facts.get("date") or facts.get("year", ""),
        medium=facts.get("medium", ""),
        classification=facts.get("classification", ""),
        department=facts.get("department", ""),
        credit=facts.get("credit", ""),
        rights=facts.get("rights") or facts.get("licence") or facts.get("license", ""),
        url=facts.get("url", ""),
    )
