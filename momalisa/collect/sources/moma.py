"""A collection file in MoMA's CSV schema (https://github.com/MuseumofModernArt/collection)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from momalisa.collect.sources.collection import csv_rows, opened
from momalisa.collect.sources.listing import NO_PICTURE, listed
from momalisa.collect.sources.selection import Wanted, selected
from momalisa.collect.sources.text import plain
from momalisa.config import Collect
from momalisa.records import Artwork
from momalisa.storage import Store

REQUIRED = ("ObjectID", "Title", "Artist", "ImageURL", "OnView")
RIGHTS = "image: rights with the museum or artist; metadata: CC0"


class MomaFile:
    """A collection file at an http(s) or gs:// address or a path."""

    def __init__(self, settings: Collect, beside: Store | None = None, wanted: Wanted | None = None) -> None:
        """`beside`: the dataset's store, where a copy of the file is kept."""
        self.settings, self.source, self.beside, self.wanted = settings, settings.source, beside, wanted
        self.left_out: Counter[str] = Counter()
        self.expected: int | None = None

    def works(self) -> Iterator[Artwork]:
        """Raises ValueError if the file cannot be read, is empty, or is in another schema."""
        return selected(self._works(), self.source, self.left_out)

    def _works(self) -> Iterator[tuple[Artwork, bool]]:
        with opened(self.source.location, self.settings, self.beside) as file:
            if self.wanted is not None:  # once through the file takes seconds, and the hours that follow can be told
                works = selected(self._read(file), self.source, Counter())
                self.expected = sum(self.wanted(work.id) for work in works)
                file.seek(0)
            yield from self._read(file)

    def _read(self, file: BinaryIO) -> Iterator[tuple[Artwork, bool]]:
        chosen = {"Department": self.source.departments, "Classification": self.source.classifications}
        required = [*REQUIRED, *(name for name, wanted in chosen.items() if wanted)]
        for row in csv_rows(file, self.source.location, required):
            yield _work(row), bool(row["OnView"].strip('" '))


def _work(row: dict[str, str]) -> Artwork:
    problem = "" if row["ImageURL"] else NO_PICTURE
    object_id = row["ObjectID"]
    if not object_id:
        row_hash = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
        problem, object_id = "no ObjectID", f"row-{row_hash[:16]}"
    return listed(
        f"moma-{object_id}",
        row["ImageURL"],
        problem,
        title=plain(row["Title"]),
        artist=plain(row["Artist"]),
        date=plain(row.get("Date", "")),
        medium=plain(row.get("Medium", "")),
        classification=row.get("Classification", ""),
        department=row.get("Department", ""),
        credit=plain(row.get("CreditLine", "")),
        rights=RIGHTS,
        url=row.get("URL", ""),
    )
