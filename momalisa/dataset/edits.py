"""Captions that a curator writes: out as CSV, into a spreadsheet, and in again as the `edits` family.

An edit wins over every captioner and stays when pictures are captioned anew. A file is taken whole or not at all.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from momalisa.dataset import Dataset, Version
from momalisa.records import EDITS, OK

COLUMNS = ("id", "title", "caption", "edited")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a title that begins so
MARKS = {"yes", "no", "withdraw", ""}
SHOWN = 5  # problems named in one message


@dataclass(frozen=True)
class Row:
    """A row of the file and the line it begins on."""

    line: int
    id: str
    caption: str
    edited: str  # one of MARKS


def export_csv(dataset: Dataset, version: Version, captioner_id: str, column: str = "short") -> bytes:
    """Every work that can be trained on, in order of id; UTF-8 with the mark that spreadsheets want.

    `column`: which of the captioner's texts.
    """
    texts, edits = dataset.texts(version, captioner_id, column), dataset.edits(version)
    again = {row["id"] for rows in dataset.columns(version.duplicates, ["id"]) for row in rows}
    works = (row for rows in dataset.columns(version.images, ["id", "title", "status"]) for row in rows)
    titles = {row["id"]: row["title"] for row in works if row["status"] == OK and row["id"] not in again}
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(COLUMNS)
    for id, title in sorted(titles.items()):
        shown = f"'{title}" if title.startswith(FORMULA) else title
        writer.writerow([id, shown, texts.get(id, ""), "yes" if id in edits else "no"])
    return sink.getvalue().encode("utf-8-sig")


def read_csv(path: Path) -> list[Row]:
    """The rows of a curator's file. Raises ValueError naming file, line and way out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save it as `CSV UTF-8 (comma delimited)`") from error
    first = text.partition("\n")[0]
    delimiter = ";" if ";" in first and "," not in first else ","  # as spreadsheets write where the comma is decimal
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(reader, [])]
    if not {"id", "caption"} <= set(header):
        raise ValueError(
            f"{path}, line 1: expected columns {', '.join(COLUMNS)}, found {first.strip()[:80]!r}; `export` writes them"
        )
    return list(_rows(path, reader, header))


def _rows(path: Path, reader: Iterator[list[str]], header: list[str]) -> Iterator[Row]:
    line = 2
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise ValueError(
                        f"{path}, line {line}: {len(cells)} cells where the first line has {len(header)}; "
                        f"put texts that hold commas in double quotes"
                    )
                row = dict(zip(header, cells, strict=True))
                yield Row(line, row["id"].strip(), " ".join(row["caption"].split()), row.get("edited", "").strip().lower())
            line = reader.line_num + 1  # type: ignore[attr-defined]
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not CSV ({error}); export again and edit that file") from error


def check(path: Path, rows: list[Row], ids: set[str], texts: Iterable[str]) -> None:
    """Raises ValueError with the first problems: ids, captions, marks."""
    problems: list[str] = []
    seen: dict[str, int] = {}
    described = set(texts)
    for row in rows:
        where = f"line {row.line}: {row.id!r}"
        if row.id not in ids:
            problems.append(f"{where} is no work with a picture in the latest version; remove the row")
        elif row.id in seen:
            problems.append(f"{where} stands on line {seen[row.id]} too; remove one of them")
        elif not row.caption and row.edited != "withdraw" and row.id in described:
            problems.append(f"{where} has an empty caption; write one, or remove the row to leave the caption as it is")
        elif row.edited not in MARKS:
            problems.append(f"{where}: edited is {row.edited!r}; it can be yes, no or withdraw")
        seen.setdefault(row.id, row.line)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{path}: nothing was imported. {'; '.join(problems[:SHOWN])}{more}")


def import_csv(dataset: Dataset, path: Path) -> tuple[int, int]:
    """Take a curator's captions into the latest version: (edits written or changed, edits withdrawn).

    A caption that is no captioner's words becomes an edit, and so does any that is marked `yes`; `withdraw` takes a work's
    edit back. Other rows, and works that the file leaves out, stay as they are: so an old export undoes nobody's edit.
    """
    rows, counts = read_csv(path), (0, 0)

    def change(latest: Version) -> Version:
        nonlocal counts
        ids, machine, old = dataset.ids(latest.images, only_ok=True), spoken(dataset, latest), dataset.edits(latest)
        check(path, rows, ids, machine.keys() | old.keys())
        new = edited(old, rows, machine)
        counts = sum(old.get(id) != caption for id, caption in new.items()), len(old.keys() - new.keys())
        return latest if new == old else with_edits(dataset, latest, new)

    dataset.update(change)
    return counts


def edited(old: dict[str, str], rows: list[Row], machine: dict[str, set[str]]) -> dict[str, str]:
    """{id: caption} of the edits after a file."""
    new = dict(old)
    for row in rows:
        if row.edited == "withdraw":
            new.pop(row.id, None)
        elif row.caption and (row.edited == "yes" or row.caption not in machine.get(row.id, set())):
            new[row.id] = row.caption
    return new


def spoken(dataset: Dataset, version: Version) -> dict[str, set[str]]:
    """{id: everything that any captioner has said of it}."""
    said: dict[str, set[str]] = {}
    for tables in version.captions.values():
        for row in (row for rows in dataset.columns(tables) for row in rows):
            if row["status"] == OK:
                texts = {value for name, value in row.items() if name not in {"id", "status", "error"} and value}
                said.setdefault(row["id"], set()).update(texts)
    return said


def with_edits(dataset: Dataset, version: Version, edits: dict[str, str]) -> Version:
    """The version with these edits in place of its own."""
    rows = [{"id": id, "caption": caption} for id, caption in edits.items()]
    return replace(version, edits=(dataset.put_rows("edits", rows, EDITS),) if rows else ())
