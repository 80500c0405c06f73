"""What a source tells otherwise now of works whose pictures stay.

    <dataset>/corrections/<hash>.parquet    rows of images without pictures, which no version names

A block of `collect` stores them; when the version is published, each images table that holds such a work is read once, and
written again with the new words beside the same pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not needed for `--help`
    import pyarrow as pa


class Corrections:
    """The corrections of a run, in memory: some 0.6 KB a work, and 1.1 KB while they are read."""

    def __init__(self, tables: Iterable[pa.Table] = ()) -> None:
        import pyarrow as pa

        from momalisa.records import CORRECTIONS

        self._rows = pa.concat_tables([CORRECTIONS.empty_table(), *tables]).combine_chunks()
        self._places = {id: place for place, id in enumerate(self._rows["id"].to_pylist())}

    @property
    def ids(self) -> Set[str]:
        return self._places.keys()

    def made(self, table: pa.Table) -> pa.Table:
        """An images table with what is told now: the same works in the same order, with the same pictures."""
        import pyarrow as pa

        from momalisa.records import TOLD

        names, rows = [*TOLD, "image_url"], list(range(table.num_rows))
        new: list[int] = []  # places in the corrections
        for row, id in enumerate(table["id"].to_pylist()):
            if (place := self._places.get(id)) is not None:
                rows[row] = table.num_rows + len(new)
                new.append(place)
        if not new:
            return table
        both = pa.concat_tables([table.select(names), self._rows.select(names).take(new)])
        told = both.take(rows).combine_chunks()
        columns = [(told if name in names else table)[name] for name in table.column_names]
        return pa.table(columns, schema=table.schema)
