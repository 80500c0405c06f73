"""Files whole or not at all, the same on a disk, in memory and in a bucket."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from momalisa import storage
from momalisa.collect.block import read_file
from momalisa.records import IMAGES, Artwork
from momalisa.storage import Pointer, StorageError, Store, canonical_json, parquet_bytes, side_by_side
from tests.faulty import Faulty


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


def test_no_file_is_whole_in_memory(tmp_path: Path) -> None:
    """A trainer's state is 13 GiB."""
    store, size = Store(str(tmp_path / "store")), 64 << 20
    (tmp_path / "source").mkdir()
    with open(tmp_path / "source" / "state", "wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        hashes = store.upload(tmp_path / "source", "state")
        store.download("state", hashes, tmp_path / "target")
        store.download("state", hashes, tmp_path / "target")  # looked at again, and kept
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "target" / "state").stat().st_size == size
    assert peak < size / 4


def test_a_file_that_is_gone_is_named_with_its_address(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{store.root}/weights/gone does not exist"):
        store.download("weights", {"gone": "0" * 64}, tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


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


def test_results_come_side_by_side_in_order_and_few_are_held() -> None:
    together = threading.Barrier(3, timeout=20)
    assert sorted(side_by_side(lambda _: together.wait(), range(3), 3)) == [0, 1, 2]
    begun: list[int] = []

    def inverse(number: int) -> float:
        begun.append(number)
        return 1 / (10 - number)

    results = side_by_side(inverse, range(20), 4)
    assert [next(results) for _ in range(3)] == [1 / 10, 1 / 9, 1 / 8]
    assert len(begun) <= 6
    assert [next(results) for _ in range(7)][-1] == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(side_by_side(inverse, [])) == []


def test_pictures_are_stored_as_they_are_and_the_rest_is_compressed() -> None:
    table = pa.table({"id": ["a", "b"], "bytes": [b"\xff\xd8" * 4000, b"x" * 9000], "title": ["t" * 9000] * 2})
    data = parquet_bytes(table)
    assert b"\xff\xd8" * 4000 in data
    assert b"t" * 9000 not in data
    assert pq.read_table(io.BytesIO(data)).equals(table)


def through_a_storm(faulty: Faulty, store: Store, seconds: float) -> None:
    """Every kind of operation begins in the storm; none may fail."""
    store.write_bytes("there", b"before")
    table = pa.table({"id": ["a"], "bytes": [b"x" * 1000]})
    path, pointer = store.put_table("images", table), store.read_pointer("refs/latest")
    faulty.mode = "storm"
    threading.Timer(seconds, lambda: setattr(faulty, "mode", "")).start()
    with ThreadPoolExecutor(8) as pool:
        read = pool.submit(store.read_bytes, "there")
        listed = pool.submit(store.list, "images")
        exists = pool.submit(store.exists, "there")
        columns = pool.submit(store.get_columns, path)
        written = pool.submit(store.write_bytes, "new", b"in the storm")
        deleted = pool.submit(store.delete, "nothing")
        moved = pool.submit(store.move_pointer, "refs/latest", {"n": 1}, pointer)
    assert (read.result(), listed.result(), exists.result()) == (b"before", [path], True)
    assert columns.result().to_pydict() == {"id": ["a"]}
    assert (written.result(), deleted.result(), moved.result()) == (None, None, True)
    assert store.read_bytes("new") == b"in the storm"
    assert store.read_pointer("refs/latest").value == {"n": 1}


def test_a_storm_of_503_and_429_fails_nothing(faulty: Faulty) -> None:
    through_a_storm(faulty, Store(f"gs://moma/{uuid4().hex}"), 5)


@pytest.mark.slow
def test_a_minute_of_503_and_429_fails_nothing(faulty: Faulty) -> None:
    through_a_storm(faulty, Store(f"gs://moma/{uuid4().hex}"), 60)


def test_a_write_whose_answer_was_lost_has_won(faulty: Faulty) -> None:
    store = Store(f"gs://moma/{uuid4().hex}")
    seen = store.read_pointer("refs/latest")
    faulty.mode = "lose"
    assert store.move_pointer("refs/latest", {"n": 1}, seen)
    assert store.read_pointer("refs/latest").value == {"n": 1}
    assert not store.move_pointer("refs/latest", {"n": 2}, seen)


@pytest.mark.parametrize("operation", ["read", "write", "exists", "list", "picture"])
def test_a_bucket_that_does_not_answer_is_asked_again(faulty: Faulty, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    monkeypatch.setattr(storage, "SILENCE_S", 0.5)
    store = Store(f"gs://moma/{uuid4().hex}")
    store.write_bytes("a/b", b"art")
    faulty.mode = "silent"
    asked = {
        "read": lambda: store.read_bytes("a/b"),
        "write": lambda: store.write_bytes("a/b", b"art") or store.read_bytes("a/b"),
        "exists": lambda: b"art" if store.exists("a/b") else b"",
        "list": lambda: b"art" if list(store.list("a")) == ["a/b"] else b"",
        "picture": lambda: read_file(store.url("a/b"), 100).data,
    }
    assert asked[operation]() == b"art"
    assert faulty.mode == ""


@pytest.mark.parametrize("operation", ["read", "write", "exists", "list", "pointer"])
@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("nobody", r"does not know who asks \(GOOGLE_APPLICATION_CREDENTIALS is not set\).*Workload Identity"),
        ("forbidden", r"this account may not do that: .*Grant it roles/storage\.objectUser on the bucket"),
    ],
)
def test_who_may_not_is_told_which_variable_and_which_role(
    faulty: Faulty, mode: str, said: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    store = Store(f"gs://moma/{uuid4().hex}")
    faulty.mode = mode
    operations: dict[str, Callable[[], object]] = {
        "read": lambda: store.read_bytes("a"),
        "write": lambda: store.write_bytes("a", b"x"),
        "exists": lambda: store.exists("a"),
        "list": lambda: store.list("a"),
        "pointer": lambda: store.move_pointer("refs/latest", {}, Pointer()),
    }
    with pytest.raises(StorageError, match=said):
        operations[operation]()


def test_credentials_that_name_no_file_are_named(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    faulty.mode = "nobody"
    with pytest.raises(StorageError, match=r"GOOGLE_APPLICATION_CREDENTIALS names /nowhere/key\.json, which does not exist"):
        Store("gs://moma/x").read_bytes("a")


def test_a_bucket_that_is_not_there_is_said(faulty: Faulty) -> None:
    with pytest.raises(StorageError, match="gs://nowhere/x/a cannot be written: there is no such bucket"):
        Store("gs://nowhere/x").write_bytes("a", b"x")
    with pytest.raises(StorageError, match="gs://nowhere/x: there is no such bucket"):
        Store("gs://nowhere/x").move_pointer("refs/latest", {}, Pointer())


def test_a_bucket_that_cannot_be_reached_is_said_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    import gcsfs.retry

    async def at_once(_: float) -> None:
        return None

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    gcsfs.GCSFileSystem.clear_instance_cache()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=at_once))
    store = Store("gs://moma/x")
    store.patience_s = 0.5
    for operation in (lambda: store.read_bytes("a"), lambda: store.read_pointer("refs/latest")):
        with pytest.raises(StorageError, match=rf"gs://moma/x could not be reached for 0 s: .*{address}: is anything listening"):
            operation()
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_columns_of_a_bucket_fetch_no_picture(faulty: Faulty) -> None:
    store = Store(f"gs://moma/{uuid4().hex}")
    path = store.put_table("images", pa.table({"id": ["a", "b"], "bytes": [os.urandom(400_000), os.urandom(400_000)]}))
    before = faulty.sent
    assert store.get_columns(path).to_pydict() == {"id": ["a", "b"]}
    assert faulty.sent - before < 100_000


def test_of_two_that_move_a_pointer_one_wins(store: Store) -> None:
    nothing = store.read_pointer("refs/latest")
    assert nothing.value is None
    assert store.move_pointer("refs/latest", {"n": 1}, nothing)
    assert not store.move_pointer("refs/latest", {"n": 2}, nothing)
    first = store.read_pointer("refs/latest")
    assert first.value == {"n": 1}
    assert store.move_pointer("refs/latest", {"n": 3}, first)
    assert not store.move_pointer("refs/latest", {"n": 4}, first)
    assert store.read_pointer("refs/latest").value == {"n": 3}


def test_files_have_a_size_and_an_age(store: Store) -> None:
    began = time.time()
    store.write_bytes("a/b", b"12345")
    file = store.files("a")["a/b"]
    assert file.size == 5
    assert began - 60 < file.modified < time.time() + 60
    assert store.missing(["a/b", "a/c", "d/e"]) == ["a/c", "d/e"]
    store.delete("a/b")
    store.delete("a/b")
    assert store.files("a") == {}


def test_a_listing_sees_what_another_process_wrote(store: Store) -> None:
    other, base = fsspec.core.url_to_fs(store.root, skip_instance_cache=True)  # it shares no listings with ours
    store.write_bytes("a/b", b"x")
    assert store.list("a") == ["a/b"]
    other.pipe_file(f"{base}/a/c", b"y")
    assert store.list("a") == ["a/b", "a/c"]
    other.rm_file(f"{base}/a/b")
    assert not store.exists("a/b")


def test_rows_are_counted(store: Store) -> None:
    paths = [store.put_table("t", pa.table({"id": list(range(n))})) for n in (0, 3)]
    assert store.count_rows(paths) == {paths[0]: 0, paths[1]: 3}


def test_a_full_disk_is_said_with_path_and_bytes_and_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    store.write_json("refs/latest", "old")
    seen = store.read_pointer("refs/latest")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            StorageError, match=rf"{tmp_path}/images/a: No space left on device: 3,000 bytes to write, [\d,]+ bytes free"
        ):
            store.write_bytes("images/a", bytes(3000))
        with pytest.raises(StorageError, match=r"Nothing was published"):
            store.move_pointer("refs/latest", "new", seen)
    assert store.read_pointer("refs/latest") == seen
    assert list(store.files("")) == ["refs/latest", "refs/latest.lock"]


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path: Path) -> None:
    """A real kernel refuses, in a process of its own."""
    code = (
        "import resource; from momalisa.storage import Store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        f"store = Store({str(tmp_path)!r}); store.write_bytes('small', bytes(900))\n"
        "try: store.write_bytes('images/big', bytes(5000))\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"{tmp_path}/images/big: File too large: 5,000 bytes to write" in done.stdout
    assert "ulimit -f" in done.stdout
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["small"]


def test_a_place_without_compare_and_swap_is_refused() -> None:
    store = Store("memory://x")
    store._fs = type("Other", (), {"cat_file": lambda self, path: (_ for _ in ()).throw(FileNotFoundError)})()
    with pytest.raises(StorageError, match="pointers are moved safely only in folders and gs:// buckets"):
        store.move_pointer("refs/latest", {}, Pointer())
