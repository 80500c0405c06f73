"""The export is what the real `datasets` reads, whole or not there."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from momalisa.dataset import Dataset
from momalisa.dataset.edits import with_edits
from momalisa.dataset.imagefolder import export
from tests.dataset.conftest import BLIP, picture


def test_datasets_reads_it(collection: Dataset, tmp_path: Path) -> None:
    version = with_edits(collection, collection.latest(), {"w1": "A MOMA artwork of: a boat"})
    target = tmp_path / "deep" / "folder"
    assert export(collection, version, collection.texts(version, BLIP), target) == 4
    names = ["metadata.jsonl", "moma_0.png", "moma_1.png", "moma_2.jpg", "moma_3.png"]
    assert sorted(path.name for path in (target / "train").iterdir()) == names
    assert (target / "train" / "moma_2.jpg").read_bytes() == picture(2, "JPEG")
    first = json.loads((target / "train" / "metadata.jsonl").read_text().splitlines()[0])
    assert (first["file_name"], first["text"], first["rights"]) == ("moma_0.png", "A MOMA artwork of: w0", "CC0")

    import datasets

    loaded = datasets.load_dataset("imagefolder", data_dir=str(target), cache_dir=str(tmp_path / "cache"), split="train")
    boat = "A MOMA artwork of: a boat"
    assert [(row["id"], row["text"]) for row in loaded.remove_columns("image")] == [
        ("w0", "A MOMA artwork of: w0"), ("w1", boat), ("w2", "A MOMA artwork of: w2"), ("w3", "A MOMA artwork of: w3"),
    ]  # fmt: skip
    raw = loaded.cast_column("image", datasets.Image(decode=False))[1]["image"]
    data = raw["bytes"] or Path(raw["path"]).read_bytes()
    assert io.BytesIO(data).getvalue() == picture(1)


def test_the_same_version_is_the_same_folder(collection: Dataset, tmp_path: Path) -> None:
    version = collection.latest()
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        export(collection, version, collection.texts(version, BLIP), folder)
    first, second = ({path.name: path.read_bytes() for path in (folder / "train").iterdir()} for folder in folders)
    assert first == second


def test_what_is_there_already_is_left_alone(collection: Dataset, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already; name a folder that does not"):
        export(collection, collection.latest(), {"w0": "x"}, tmp_path / "there")


def test_an_export_that_fails_leaves_nothing(collection: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = collection.latest()
    with pytest.raises(ValueError, match="holds no picture with a caption: run the collect and caption jobs first"):
        export(collection, version, {}, tmp_path / "new" / "export")
    written, write = [], Path.write_bytes

    def fails(path: Path, data: bytes) -> int:
        if len(written) == 2:
            raise OSError("the disk is full")
        written.append(path)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError, match="the disk is full"):
        export(collection, version, collection.texts(version, BLIP), tmp_path / "new" / "export")
    assert list((tmp_path / "new").iterdir()) == []
