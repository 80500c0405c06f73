"""A folder or gs:// prefix of pictures, and what a metadata.jsonl or metadata.csv in it tells about them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

from momalisa.collect.sources.access import unreadable
from momalisa.collect.sources.collection import csv_rows, opened
from momalisa.collect.sources.selection import selected
from momalisa.collect.sources.text import plain
from momalisa.config import Collect
from momalisa.records import REJECTED, Artwork, Reason

SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp"}
METADATA = ("metadata.jsonl", "metadata.csv")


class PictureFolder:
    """Pictures below a path or a gs:// prefix. Their names and metadata are held in memory, the pictures are not."""

    def __init__(self, settings: Collect) -> None:
        self.settings, self.source = settings, settings.source
        self.location = settings.source.location.rstrip("/") or "/"
        self.left_out: Counter[str] = Counter()

    def works(self) -> Iterator[Artwork]:
        """Pictures in order of their paths, then files that the metadata name but are not there.

        Raises ValueError if there is no picture, or the metadata cannot be read.
        """
        return selected(((work, True) for work in self._works()), self.source, self.left_out)

    def _works(self) -> Iterator[Artwork]:
        files = self._files()
        told = self._metadata(files)
        pictures = [name for name in sorted(files) if PurePosixPath(name).suffix.lower() in SUFFIXES]
        if not pictures:
            known = " ".join(sorted(SUFFIXES))
            raise ValueError(f"{self.location} holds no picture ({known}); check collect.source.location")
        for name in pictures:
            yield _work(name, files[name], told.get(name, {}))
        for name in sorted(told.keys() - files.keys()):
            yield _work(name, "", told[name])

    def _files(self) -> dict[str, str]:
        """Every file that is not hidden: relative path -> address."""
        try:
            fs, base = fsspec.core.url_to_fs(self.location)
            if "://" not in self.location and not Path(base).is_dir():
                raise FileNotFoundError(self.location)
            found = fs.find(base)
        except Exception as error:  # each storage has its own
            raise unreadable(self.location, error) from error
        prefix = base.rstrip("/") + "/"
        address = fs.unstrip_protocol if "://" in self.location else str
        names = {name.removeprefix(prefix): address(name) for name in found}
        return {name: url for name, url in names.items() if not any(part.startswith(".") for part in name.split("/"))}

    def _metadata(self, files: dict[str, str]) -> dict[str, dict[str, str]]:
        """file_name -> what is told about it."""
        name = next((name for name in METADATA if name in files), None)
        if name is None:
            return {}
        where = f"{self.location}/{name}"
        with opened(files[name], self.settings) as file:
            rows = _json_rows(file, where) if name.endswith(".jsonl") else csv_rows(file, where, ["file_name"])
            return {str(PurePosixPath(row["file_name"])): row for row in rows if row["file_name"]}


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


def _work(name: str, address: str, told: dict[str, str]) -> Artwork:
    facts = {key: plain(value) for key, value in told.items()}
    return Artwork(
        id=f"folder-{hashlib.sha256(name.encode()).hexdigest()[:16]}",
        status="" if address else REJECTED,
        error="" if address else "no picture",
        reason="" if address else Reason.NO_PICTURE,
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
