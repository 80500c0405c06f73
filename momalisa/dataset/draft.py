"""What an unfinished stage has stored so far, so that a killed one goes on from its last table.

    <dataset>/drafts/<stage>-<hash>/<hash of the table>.json

The hash in the folder's name is of the version that the stage began from and of all that decides its tables: as soon as
anything is published, a draft is nobody's. Readers of the dataset never look here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from momalisa.storage import Store, side_by_side


class Entry(NamedTuple):
    """A block's table that was stored whole, the ids of works whose older rows it replaces, and of those whose captions stay."""

    table: str  # "" where `told` is all
    replaced: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    told: str = ""  # a table of corrections; "" where there are none

    @property
    def tables(self) -> list[str]:
        return [table for table in (self.table, self.told) if table]


class Draft:
    """The tables of a stage, one small file each, written after the table itself."""

    def __init__(self, store: Store, stage: str, origin: str) -> None:
        """`origin`: a hash, see above."""
        self.store, self.folder = store, f"drafts/{stage}-{origin}"

    def add(self, entry: Entry) -> None:
        ids = {"replaced": sorted(entry.replaced), "kept": sorted(entry.kept)}
        self.store.write_json(self._place(entry.tables[0]), {"table": entry.table, "told": entry.told, **ids})

    def entries(self) -> list[Entry]:
        """What was stored so far, in order of the tables' paths."""
        found = side_by_side(self.store.read_json, self.store.list(self.folder))
        return sorted(
            Entry(value["table"], tuple(value["replaced"]), tuple(value.get("kept", ())), value.get("told", ""))
            for value in found
        )

    def drop(self, tables: Iterable[str]) -> None:
        """Forget the entries whose first tables these are: what they hold is made again."""
        for table in tables:
            self.store.delete(self._place(table))

    def _place(self, table: str) -> str:
        return f"{self.folder}/{PurePosixPath(table).stem}.json"

    def clear(self) -> None:
        """Forget them: they were published."""
        for _ in side_by_side(self.store.delete, self.store.list(self.folder)):
            pass
