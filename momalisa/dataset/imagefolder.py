"""A version as a folder of pictures with their texts, as `datasets.load_dataset("imagefolder")` opens it.

DIR/train/metadata.jsonl        file_name, text, id, title, artist, ..., rights
DIR/train/moma_0.png, moma_1.jpg, ...
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from momalisa.dataset import Dataset, Version
from momalisa.records import OK

CARRIED = ("id", "title", "artist", "date", "medium", "credit", "rights", "url")
JPEG = b"\xff\xd8"


def export(dataset: Dataset, version: Version, texts: dict[str, str], directory: Path) -> int:
    """Write every good picture that has a text, in order of id; returns how many. The folder is there whole or not at all.

    Raises ValueError where it exists already or there is nothing to write.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already; name a folder that does not, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.partial")
    try:
        count = _write(dataset, version, texts, partial / "train")
        if not count:
            raise ValueError(f"{dataset.store.root} holds no picture with a caption: run the collect and caption jobs first")
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def _write(dataset: Dataset, version: Version, texts: dict[str, str], folder: Path) -> int:
    folder.mkdir(parents=True)
    numbers = {id: number for number, id in enumerate(sorted(dataset.ids(version.images, only_ok=True) & texts.keys()))}
    lines: dict[int, str] = {}
    for row in dataset.rows(version.images, ["status", "bytes", *CARRIED]):
        number = numbers.get(row["id"])
        if number is None or number in lines or row["status"] != OK:
            continue
        name = f"moma_{number}.{'jpg' if row['bytes'].startswith(JPEG) else 'png'}"
        (folder / name).write_bytes(row["bytes"])
        lines[number] = _line(name, texts[row["id"]], row)
    (folder / "metadata.jsonl").write_text("".join(lines[number] for number in sorted(lines)), encoding="utf-8")
    return len(lines)


def _line(name: str, text: str, row: dict[str, Any]) -> str:
    return json.dumps({"file_name": name, "text": text, **{key: row[key] for key in CARRIED}}, ensure_ascii=False) + "\n"
