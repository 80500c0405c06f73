"""A version comes back exactly, pictures included: by name, by a manifest, by DVC, from another place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from momalisa.dataset import Dataset
from momalisa.dataset.checkout import checkout, read_manifest
from momalisa.dataset.garbage import garbage, sweep
from momalisa.records import OK
from momalisa.storage import canonical_json
from tests.dataset.conftest import add, caption, picture, work

HOME = Path(__file__).parents[2]


def test_a_published_version_is_the_latest_again(dataset: Dataset) -> None:
    old = add(dataset, [work(0)], [caption("w0")])
    new = add(dataset, [work(1)])
    assert checkout(dataset, old) == 0
    assert dataset.latest() == old
    assert [entry.sha256 for entry in dataset.log()] == [old.sha256, new.sha256, old.sha256]


def test_with_a_table_missing_nothing_moves(dataset: Dataset) -> None:
    old, new = add(dataset, [work(0)]), add(dataset, [work(1)])
    dataset.store.delete(old.images[0])
    with pytest.raises(ValueError, match=rf"1 of 1 tables of version {old.sha256[:12]} are missing, for example images/.*--from"):
        checkout(dataset, old)
    assert dataset.latest() == new


def test_missing_tables_come_from_another_dataset_and_are_checked(collection: Dataset, tmp_path: Path) -> None:
    version = collection.latest()
    elsewhere = Dataset(str(tmp_path / "elsewhere"))
    assert checkout(elsewhere, version, collection.store.root) == len(version.paths())
    assert list(elsewhere.rows(elsewhere.latest().images)) == list(collection.rows(version.images))
    assert checkout(elsewhere, version, collection.store.root) == 0
    broken = Dataset(str(tmp_path / "broken"))
    collection.store.write_bytes(version.images[0], b"changed")
    with pytest.raises(ValueError, match=f"{version.images[0]} is not what its name says"):
        checkout(broken, version, collection.store.root)
    assert broken.log() == []
    collection.store.delete(version.images[0])
    with pytest.raises(ValueError, match="lacks 1 of these tables too"):
        checkout(broken, version, collection.store.root)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "is no manifest of a dataset: JSONDecodeError"),
        (b"[]", "is no manifest of a dataset"),
        (b'{"format": 1}', "is no manifest of a dataset: KeyError: 'images'"),
        (b'{"format": 9}', "manifest format 9 is not 1"),
        (None, "No such file or directory; `dvc pull` brings it"),
    ],
)
def test_a_file_that_is_no_manifest_is_said(tmp_path: Path, data: bytes | None, said: str) -> None:
    path = tmp_path / "manifest.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match="manifest") as raised:
        read_manifest(str(path))
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "images/../../x.parquet", "/images/" + "0" * 32 + ".parquet", "images/x.parquet"]
)
def test_a_manifest_names_nothing_outside_of_the_dataset(collection: Dataset, tmp_path: Path, name: str) -> None:
    version = replace(collection.latest(), images=(name,))
    (tmp_path / "m.json").write_bytes(canonical_json(version.as_json()))
    with pytest.raises(ValueError, match="which is no table's path"):
        read_manifest(str(tmp_path / "m.json"))


@pytest.mark.timeout(600)
def test_dvc_brings_an_older_version_back_pictures_included(dataset: Dataset, config: str, tmp_path: Path) -> None:
    """Two versions tracked by data.dvc; a fresh clone pulls the first and checks it out, after gc."""
    museum, remote = tmp_path / "museum", tmp_path / "remote"
    museum.mkdir()
    old = add(dataset, [work(0), work(1)], [caption("w0"), caption("w1")])
    run("git", "init", "-q", cwd=museum)
    dvc("init", "-q", cwd=museum)
    (museum / ".dvc" / "config").write_text(
        f"[core]\n    remote = museum\n    analytics = false\n['remote \"museum\"']\n    url = {remote}\n"
    )
    tracked(museum, config, "first")
    add(dataset, [work(2)])
    dataset.publish(replace(dataset.latest(), images=dataset.latest().images[:1], captions={}))
    tracked(museum, config, "second")
    dvc("push", "-q", "--all-commits", cwd=museum)
    sweep(dataset, garbage(dataset, grace_hours=0))

    clone = tmp_path / "clone"
    run("git", "clone", "-q", str(museum), str(clone), cwd=tmp_path)
    run("git", "checkout", "-q", "HEAD~1", cwd=clone)
    assert not (clone / "data").exists()
    dvc("pull", "-q", cwd=clone)
    command("checkout", "--config", config, "--manifest", "data/manifest.json", cwd=clone)
    assert dataset.latest() == old
    pictures = {row["id"]: row["bytes"] for row in dataset.rows(dataset.latest().images) if row["status"] == OK}
    assert pictures == {"w0": picture(0), "w1": picture(1)}


def tracked(museum: Path, config: str, message: str) -> None:
    """Describe the latest version in data/manifest.json and commit data.dvc."""
    command("manifest", "--config", config, "--to", "data/manifest.json", cwd=museum)
    dvc("add", "-q", "data", cwd=museum)
    run("git", "add", "-A", cwd=museum)
    run("git", "-c", "user.name=c", "-c", "user.email=c@example.org", "commit", "-q", "-m", message, cwd=museum)
    assert run("git", "ls-files", cwd=museum).split() == [
        ".dvc/.gitignore",
        ".dvc/config",
        ".dvcignore",
        ".gitignore",
        "data.dvc",
    ]


def dvc(*arguments: str, cwd: Path) -> str:
    found = shutil.which("dvc", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "dvc is not installed; it is one of the development dependencies: pip install -e '.[dev]'"
    return run(found, *arguments, cwd=cwd)


def command(*arguments: str, cwd: Path) -> str:
    return run(sys.executable, "-m", "momalisa.dataset", *arguments, cwd=cwd)


def run(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(HOME), "DVC_NO_ANALYTICS": "1", "HOME": str(cwd)}
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
