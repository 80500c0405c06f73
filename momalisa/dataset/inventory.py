"""What a version holds: rows of each family, works that could not be used, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from momalisa.dataset import Dataset, Publication, Version
from momalisa.records import OK


def inventory(dataset: Dataset, version: Version) -> dict[str, Any]:
    """Counts for people and programs: works, rejects by reason, rows and bytes of each family."""
    works = [row for rows in dataset.columns(version.images, ["status", "reason", "error"]) for row in rows]
    return {
        "sha256": version.sha256,
        "works": sum(row["status"] == OK for row in works),
        "rejected": _rejected(row for row in works if row["status"] != OK),
        "duplicates": sum(dataset.store.count_rows(version.duplicates).values()),
        "edits": sum(dataset.store.count_rows(version.edits).values()),
        "families": {folder: _family(dataset, folder, paths) for folder, paths in sorted(version.families().items()) if paths},
    }


def _rejected(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{reason: how many works, and their commonest error}, the commonest reason first."""
    errors: dict[str, Counter[str]] = {}
    for row in rows:
        errors.setdefault(row["reason"], Counter())[row["error"]] += 1
    ordered = sorted(errors.items(), key=lambda item: (-item[1].total(), item[0]))
    return {reason: {"works": said.total(), "example": _commonest(said)} for reason, said in ordered}


def _commonest(said: Counter[str]) -> str:
    return min(said, key=lambda error: (-said[error], error))


def _family(dataset: Dataset, folder: str, paths: tuple[str, ...]) -> dict[str, int]:
    files = dataset.store.files(folder)
    size = sum(files[path].size for path in paths if path in files)
    if folder in {"duplicates", "edits"}:
        return {"rows": sum(dataset.store.count_rows(paths).values()), "tables": len(paths), "bytes": size}
    failed = [row for rows in dataset.columns(paths, ["status"]) for row in rows]
    count = sum(row["status"] != OK for row in failed)
    return {"rows": len(failed), "failed": count, "tables": len(paths), "bytes": size}


def history(dataset: Dataset, limit: int | None = None) -> list[dict[str, Any]]:
    """Publications, newest first, each with its rows by family (None: that version was deleted)."""
    there = set(dataset.published())
    entries = dataset.log()[:limit]
    versions = {digest: dataset.read(digest) for digest in {entry.sha256 for entry in entries} & there}
    rows = dataset.store.count_rows(path for version in versions.values() for path in version.paths())
    return [_line(entry, versions.get(entry.sha256), rows) for entry in entries]


def _line(entry: Publication, version: Version | None, rows: dict[str, int]) -> dict[str, Any]:
    families = version and {folder: sum(map(rows.__getitem__, paths)) for folder, paths in version.families().items() if paths}
    return {"sequence": entry.sequence, "time": entry.time, "sha256": entry.sha256, "rows": families}


def log_text(lines: list[dict[str, Any]]) -> str:
    return "\n".join(_log_line(line) for line in lines)


def _log_line(line: dict[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for folder, rows in (line["rows"] or {}).items():
        counts[folder.partition("/")[0]] += rows
    said = ", ".join(f"{rows} {family}" for family, rows in counts.items()) if line["rows"] is not None else "deleted"
    return f"{line['sequence']:>5}  {line['time'] or '-':25}  {line['sha256'][:12]}  {said or 'empty'}"


def show_text(found: dict[str, Any]) -> str:
    rejected = sum(one["works"] for one in found["rejected"].values())
    lines = [f"version {found['sha256']}", f"{found['works']} works, {rejected} rejected, {found['duplicates']} duplicates, "]
    lines[-1] += f"{found['edits']} captions edited"
    lines += [f"  {one['works']:>7} x {reason} ({one['example']})" for reason, one in found["rejected"].items()]
    for folder, family in found["families"].items():
        failed = f", {family['failed']} without a result" if family.get("failed") else ""
        lines.append(f"{folder}: {family['rows']} rows{failed}, {family['tables']} tables, {megabytes(family['bytes'])}")
    return "\n".join(lines)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"
