"""What two versions differ in: works, captions, edits. Tables that both name are the same and are not read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from momalisa.dataset import Dataset, Version


@dataclass(frozen=True)
class Changes:
    """Rows of a family by id; `changed` holds {id: {column: [before, after]}}."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


def difference(dataset: Dataset, before: Version, after: Version) -> dict[str, Changes]:
    """{folder of a family: its changes}, without families that are alike; latents follow from the rest and are left out.

    A work has changed if any of its columns but the picture's bytes has.
    """
    old, new = before.families(), after.families()
    folders = sorted(folder for folder in old.keys() | new.keys() if not folder.startswith("latents/"))
    found = {folder: _changes(dataset, old.get(folder, ()), new.get(folder, ())) for folder in folders}
    return {folder: changes for folder, changes in found.items() if changes}


def _changes(dataset: Dataset, before: tuple[str, ...], after: tuple[str, ...]) -> Changes:
    old, new = _table(dataset, set(before) - set(after)), _table(dataset, set(after) - set(before))
    place = pc.index_in(new["id"], value_set=old["id"].combine_chunks())
    gone = pc.invert(pc.is_in(old["id"], value_set=new["id"].combine_chunks()))
    return Changes(
        added=sorted(new["id"].filter(place.is_null()).to_pylist()),
        removed=sorted(old["id"].filter(gone).to_pylist()),
        changed=_changed(old.take(place.drop_null()), new.filter(place.is_valid())),
    )


def _table(dataset: Dataset, paths: set[str]) -> pa.Table:
    """The rows of some tables, without pictures; where there is no table, no row."""
    empty = pa.table({"id": pa.array([], pa.string())})
    return pa.concat_tables([empty, *dataset.tables(paths)], promote_options="default")


def _changed(old: pa.Table, new: pa.Table) -> dict[str, dict[str, list[Any]]]:
    """{id: {column: [before, after]}} of two tables with the same ids in the same order."""
    ids, changed = new["id"].to_pylist(), dict[str, dict[str, list[Any]]]()
    for name in dict.fromkeys([*old.column_names, *new.column_names]):
        if name in old.column_names and name in new.column_names and old[name].equals(new[name]):
            continue
        pairs = zip(ids, _values(old, name), _values(new, name), strict=True)
        for id, before, after in pairs:
            if before != after:
                changed.setdefault(id, {})[name] = [before, after]
    return dict(sorted(changed.items()))


def _values(table: pa.Table, name: str) -> list[Any]:
    values: list[Any] = table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
    return values


def as_json(found: dict[str, Changes]) -> dict[str, Any]:
    return {folder: asdict(changes) for folder, changes in found.items()}


def as_text(found: dict[str, Changes], limit: int) -> str:
    """A line for each change, `limit` of each kind."""
    lines = []
    for folder, changes in found.items():
        counts = f"{len(changes.added)} added, {len(changes.removed)} removed, {len(changes.changed)} changed"
        lines.append(f"{folder}: {counts}")
        lines += _some([f"  + {id}" for id in changes.added], limit)
        lines += _some([f"  - {id}" for id in changes.removed], limit)
        lines += _some([f"  ~ {id}  {_said(columns)}" for id, columns in changes.changed.items()], limit)
    return "\n".join(lines) or "no difference in works, captions or edits"


def _said(columns: dict[str, list[Any]]) -> str:
    return "; ".join(f"{name}: {before!r} -> {after!r}" for name, (before, after) in columns.items())


def _some(lines: list[str], limit: int) -> list[str]:
    return lines if len(lines) <= limit else [*lines[:limit], f"  ... and {len(lines) - limit} more (--limit)"]
