"""What two versions differ in: works, captions, edits. Tables that both name are the same and are not read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

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
    old, new = _rows(dataset, set(before) - set(after)), _rows(dataset, set(after) - set(before))
    both = sorted(old.keys() & new.keys())
    return Changes(
        added=sorted(new.keys() - old.keys()),
        removed=sorted(old.keys() - new.keys()),
        changed={id: columns for id in both if (columns := _columns(old[id], new[id]))},
    )


def _rows(dataset: Dataset, paths: set[str]) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for rows in dataset.columns(paths) for row in rows}


def _columns(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    if old == new:
        return {}
    return {name: [old.get(name), new.get(name)] for name in {**old, **new} if old.get(name) != new.get(name)}


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
