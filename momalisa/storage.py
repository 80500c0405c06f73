"""Files in a folder or a bucket, written whole or not at all, and pointers that are moved last.

`Store` is a thin layer over fsspec: `out/demo`, `/data/moma` and `gs://bucket/moma` behave alike. A file is
visible only when complete (locally: a temporary file and a rename; object stores: one upload). Nothing is ever
changed in place but a `refs/` pointer, and that by compare-and-swap: of two writers at once, one wins.

A bucket that answers 429 or 503, or not at all, is asked again for `patience_s`, beyond gcsfs's own half minute.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

if TYPE_CHECKING:  # neither is needed for `--help`
    import pyarrow as pa

Item = TypeVar("Item")
Value = TypeVar("Value")

PICTURES = {"bytes"}  # JPEG and PNG files: nothing makes them smaller
BLOBS = {"bytes", "thumbnail", "moments", "mirrored"}  # columns that are read only where they are asked for
PIECE = 8 << 20  # bytes of a large file that are fetched at a time
READERS = 16  # threads that read small files
SILENCE_S = 30.0  # a bucket that sends nothing for so long is asked again
HIDDEN = (".partial", ".lock")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_in_this_process = threading.Lock()


class StorageError(OSError, ValueError):
    """Storage that cannot be used; the message names the place, why, and the way out."""


@dataclass(frozen=True)
class File:
    """A file's size in bytes and when it was written, in seconds since 1970."""

    size: int
    modified: float


@dataclass(frozen=True)
class Pointer:
    """What a pointer said when it was read (None: there is none), and the state of it that the next writer must find."""

    value: Any = None
    state: str = "0"


class Store:
    """A root, local or `gs://`, and the few operations the stages need. Paths are relative, with slashes."""

    patience_s = 150.0

    def __init__(self, root: str) -> None:
        import fsspec

        remote = "://" in root
        self.root = root.rstrip("/") if remote else str(Path(root).absolute())
        # A listing that was remembered would hide what other processes wrote since.
        fresh = {"use_listings_cache": False} if remote else {}
        self._fs, self._base = fsspec.core.url_to_fs(self.root, **fresh, **options(self.root))
        self.is_local = type(self._fs).__name__ == "LocalFileSystem"
        self.is_bucket = in_bucket(self.root)

    def __reduce__(self) -> tuple[Any, ...]:  # to workers as its root alone
        return (Store, (self.root,))

    def url(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    def _ask(self, operation: Callable[[], Value]) -> Value:
        """What a bucket answers: transient errors are passed over for `patience_s`, the rest is a StorageError."""
        return patiently(operation, self.root, self.patience_s) if self.is_bucket else operation()

    def exists(self, path: str) -> bool:
        return bool(self._ask(lambda: self._fs.exists(self._full(path))))

    def missing(self, paths: Iterable[str]) -> builtins.list[str]:
        """Those that do not exist, sorted; each folder is listed once."""
        wanted = set(paths)
        for folder in {path.rpartition("/")[0] for path in wanted}:
            wanted -= set(self.list(folder))
        return sorted(wanted)

    def read_bytes(self, path: str) -> bytes:
        """Raises FileNotFoundError with the full address."""
        try:
            return bytes(self._ask(lambda: self._fs.cat_file(self._full(path))))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url(path)} does not exist") from error

    def write_bytes(self, path: str, data: bytes) -> None:
        """Raises StorageError, and leaves what was there, where the disk is full or the bucket cannot be written."""
        target = self._full(path)
        if not self.is_local:
            try:
                self._ask(lambda: self._fs.pipe_file(target, data))
            except FileNotFoundError as error:
                raise StorageError(f"{self.url(path)} cannot be written: there is no such bucket; create it first") from error
            return
        with _replacing(target, len(data)) as hidden, open(hidden, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def read_json(self, path: str) -> Any:
        return json.loads(self.read_bytes(path))

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, canonical_json(value))

    def read_pointer(self, path: str) -> Pointer:
        """A pointer and its state, for `move_pointer`."""
        if self.is_bucket:
            return self._ask(lambda: _read_blob(self.root, path))
        try:
            data = self.read_bytes(path)
        except FileNotFoundError:
            return Pointer()
        return Pointer(json.loads(data), hashlib.sha256(data).hexdigest())

    def move_pointer(self, path: str, value: Any, seen: Pointer) -> bool:
        """Write a pointer if it is still as it was `seen`; False, and nothing changed, if another writer was first.

        In a bucket by `if_generation_match`; in a folder under a lock that the kernel frees when its holder dies.
        """
        data = canonical_json(value)
        if self.is_bucket:
            moved = self._ask(lambda: _write_blob(self.root, path, data, int(seen.state)))
            return moved or self.read_bytes(path) == data  # an answer may be lost after the write
        with self._locked(path):
            if self.read_pointer(path).state != seen.state:
                return False
            self.write_bytes(path, data)
            return True

    @contextmanager
    def _locked(self, path: str) -> Iterator[None]:
        if not self.is_local:
            if type(self._fs).__name__ != "MemoryFileSystem":
                raise StorageError(
                    f"{self.root}: pointers are moved safely only in folders and gs:// buckets; choose one as root"
                )
            with _in_this_process:
                yield
            return
        lock = Path(self._full(path) + ".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def put_file(self, path: str, source: BinaryIO) -> None:
        """Copy an open file in, from its start, never whole in memory. Raises StorageError as `write_bytes` does."""
        size = source.seek(0, os.SEEK_END)

        def copy(target: str) -> None:
            source.seek(0)
            with self._fs.open(target, "wb") as file:
                shutil.copyfileobj(source, file, PIECE)

        if self.is_local:
            with _replacing(self._full(path), size) as hidden:
                copy(hidden)
        else:  # a bucket shows what is whole
            self._ask(lambda: copy(self._full(path)))

    def get_file(self, path: str, target: BinaryIO) -> None:
        """Copy a file out, never whole in memory. Raises FileNotFoundError."""
        copy_out(self._fs, self._full(path), target, self._ask)

    def list(self, folder: str) -> builtins.list[str]:
        """Every file below a folder, relative to the root, sorted; partial writes and locks are not files."""
        return [path for path in self.files(folder) if not path.endswith(HIDDEN)]

    def files(self, folder: str) -> dict[str, File]:
        """Every file below a folder, partial writes too, with its size and age; sorted."""
        try:
            found = self._ask(lambda: self._fs.find(self._full(folder), detail=True))
        except FileNotFoundError:
            return {}
        prefix = self._base.rstrip("/") + "/"
        return {name.removeprefix(prefix): File(int(info["size"]), _modified(info)) for name, info in sorted(found.items())}

    def delete(self, path: str) -> None:
        """A file that is gone already is no error."""
        try:
            self._ask(lambda: self._fs.rm_file(self._full(path)))
        except FileNotFoundError:
            return

    def put_table(self, folder: str, table: pa.Table) -> str:
        """Write a table as `<folder>/<sha256 of its bytes>.parquet` and return that path.

        One that is there already is written again: so it is young, and garbage collection leaves it alone.
        """
        data = parquet_bytes(table)
        path = f"{folder}/{hashlib.sha256(data).hexdigest()[:32]}.parquet"
        self.write_bytes(path, data)
        return path

    def get_table(self, path: str, columns: builtins.list[str] | None = None) -> pa.Table:
        import pyarrow.parquet as pq

        return pq.read_table(io.BytesIO(self.read_bytes(path)), columns=columns)

    def get_columns(self, path: str, columns: builtins.list[str] | None = None) -> pa.Table:
        """Some columns of a table (None: all but pictures and moments): nothing else is fetched."""
        import pyarrow.parquet as pq

        def read() -> pa.Table:
            with self._open(path) as file, pq.ParquetFile(file, pre_buffer=True) as parquet:
                names = [name for name in parquet.schema_arrow.names if name not in BLOBS] if columns is None else columns
                return parquet.read(columns=names)

        try:
            return self._ask(read)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.url(path)} does not exist, though a version names it; where another root has it, "
                f"`python -m momalisa.dataset checkout --manifest FILE --from ROOT` brings it back"
            ) from error

    def count_rows(self, paths: Iterable[str]) -> dict[str, int]:
        """{path: rows} of tables, by their footers."""
        import pyarrow.parquet as pq

        def count(path: str) -> int:
            def read() -> int:
                with self._open(path) as file, pq.ParquetFile(file) as parquet:
                    return int(parquet.metadata.num_rows)

            return self._ask(read)

        chosen = sorted(set(paths))
        return dict(zip(chosen, side_by_side(count, chosen), strict=True))

    def _open(self, path: str) -> Any:
        """Open to read ranges; without a cache, so that what is fetched is what is asked for."""
        return self._fs.open(self._full(path), "rb", **({} if self.is_local else {"cache_type": "none"}))

    def upload(self, directory: Path, folder: str) -> dict[str, str]:
        """Copy a local directory in, no file whole in memory; returns {relative name: sha256}."""
        hashes = {}
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = file.relative_to(directory).as_posix()
            hashes[name] = _sha256(file)
            self._send(file, f"{folder}/{name}")
        return hashes

    def _send(self, source: Path, path: str) -> None:
        """Copy a file in. Raises StorageError as `write_bytes` does."""
        target = self._full(path)
        if not self.is_local:
            try:
                self._ask(lambda: self._fs.put_file(str(source), target))
            except FileNotFoundError as error:
                raise StorageError(f"{self.url(path)} cannot be written: there is no such bucket; create it first") from error
            return
        with _replacing(target, source.stat().st_size) as hidden:
            shutil.copyfile(source, hidden)
            with open(hidden, "rb") as file:
                os.fsync(file.fileno())

    def download(self, folder: str, hashes: dict[str, str], directory: Path) -> Path:
        """Copy named files out, none whole in memory, checking each hash; files already there and right are kept.

        Raises ValueError naming the file whose content is not what its manifest says, and FileNotFoundError with its address.
        """
        for name, expected in hashes.items():
            target = directory / name
            if not target.exists() or _sha256(target) != expected:
                self._bring(f"{folder}/{name}", expected, target)
        return directory

    def _bring(self, path: str, expected: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
        try:
            self._ask(lambda: self._fs.get_file(self._full(path), str(partial)))
            if (actual := _sha256(partial)) != expected:
                raise ValueError(f"{self.url(path)} has sha256 {actual[:16]}..., its manifest says {expected[:16]}...")
            os.replace(partial, target)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url(path)} does not exist") from error
        finally:
            partial.unlink(missing_ok=True)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def side_by_side(function: Callable[[Item], Value], items: Iterable[Item], at_a_time: int = READERS) -> Iterator[Value]:
    """What a function makes of each item, in order. No more than `at_a_time` are at work or wait to be taken."""
    waiting: deque[Future[Value]] = deque()
    with ThreadPoolExecutor(at_a_time) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == at_a_time:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def copy_out(fs: Any, path: str, target: BinaryIO, ask: Callable[[Callable[[], Any]], Any]) -> None:
    """Copy a file of an fsspec file system, piece by piece; `ask` makes each call, and may make it again."""
    size = int(ask(lambda: fs.size(path)))
    for start in range(0, size, PIECE):
        target.write(ask(partial(fs.cat_file, path, start=start, end=min(size, start + PIECE))))


def in_bucket(location: str) -> bool:
    return location.startswith(("gs://", "gcs://"))


def options(location: str) -> dict[str, Any]:
    """What fsspec is told of a location: a bucket's client would wait for an answer for ever."""
    if not in_bucket(location):
        return {}
    from aiohttp import ClientTimeout

    return {"requests_timeout": ClientTimeout(sock_connect=SILENCE_S, sock_read=SILENCE_S)}


def canonical_json(value: Any) -> bytes:
    """One text for one value: sorted keys, UTF-8, a final newline."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def parquet_bytes(table: pa.Table) -> bytes:
    """The same rows give the same bytes: one row group, no metadata of ours or of pandas; zstd, but pictures as they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink, names = pa.BufferOutputStream(), table.column_names  # it grows with fewer fresh pages of memory than BytesIO does
    pq.write_table(
        table.replace_schema_metadata(None),
        sink,
        compression={name: "none" if name in PICTURES else "zstd" for name in names},
        use_dictionary=[name for name in names if name not in BLOBS],
        row_group_size=max(table.num_rows, 1),
        store_schema=False,
    )
    made: bytes = sink.getvalue().to_pybytes()
    return made


@contextmanager
def _replacing(target: str, size: int) -> Iterator[str]:
    """The name of a file to write, which takes the target's place once it is whole. Raises StorageError where a disk is full."""
    hidden = f"{target}.{uuid.uuid4().hex}.partial"
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        yield hidden
        os.replace(hidden, target)
    except OSError as error:
        Path(hidden).unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        raise StorageError(full(target, size, error)) from error


def full(target: str, size: int, error: OSError) -> str:
    """What to say of a disk without room."""
    folder = next(parent for parent in Path(target).parents if parent.exists())
    free = shutil.disk_usage(folder).free
    limit = " (or the limit on a file's size, `ulimit -f`)" if error.errno == errno.EFBIG else ""
    return (
        f"{target}: {error.strerror or error}: {size:,} bytes to write, {free:,} bytes free there{limit}. Nothing was published; "
        f"free some space (`python -m momalisa.dataset gc` deletes tables that no version names) or set root to a larger disk, "
        f"then run again: what is stored is kept"
    )


def patiently(operation: Callable[[], Value], root: str, patience_s: float) -> Value:
    """Call until a bucket answers or `patience_s` are over. FileNotFoundError passes; other errors become StorageError."""
    try:
        return retried(operation, patience_s)
    except (FileNotFoundError, StorageError):
        raise
    except Exception as error:  # each client has its own
        said = _unreachable(root, patience_s, error) if _is_transient(error) else _refused(root, error)
        if said is None:
            raise
        raise StorageError(said) from error


def retried(operation: Callable[[], Value], patience_s: float | None = None) -> Value:
    """Call until a bucket answers or `patience_s` (None: the stores') are over. Errors are those of its client."""
    from google.api_core.exceptions import RetryError
    from google.api_core.retry import Retry

    timeout_s = Store.patience_s if patience_s is None else patience_s
    try:
        answer: Value = Retry(predicate=_is_transient, initial=0.5, maximum=15.0, multiplier=2.0, timeout=timeout_s)(operation)()
    except RetryError as error:
        raise error.cause or error from None
    return answer


def _is_transient(error: Exception) -> bool:
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.retry import DEFAULT_RETRY

    if isinstance(error, GoogleAuthError):
        return bool(error.retryable)
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    from gcsfs.retry import is_retriable

    known = is_retriable(error) or DEFAULT_RETRY._predicate(error) or isinstance(error, TimeoutError | ConnectionError)
    return bool(known) and _code(error) != 401


def _code(error: Exception) -> int | None:
    """The HTTP status behind an error of gcsfs or google-cloud-storage."""
    code = getattr(error, "code", None)
    if isinstance(code, int | str) and str(code).isdigit():
        return int(code)
    return 403 if str(error).startswith("Forbidden:") else None


def _refused(root: str, error: Exception) -> str | None:
    from google.auth.exceptions import GoogleAuthError

    variable = "GOOGLE_APPLICATION_CREDENTIALS"
    if isinstance(error, GoogleAuthError) or _code(error) == 401:
        named = os.environ.get(variable)
        said = f"{variable} names {named}" if named else f"{variable} is not set"
        said += ", which does not exist" if named and not Path(named).exists() else ""
        return (
            f"{root}: Google Cloud does not know who asks ({said}): {_first_line(error)}. Set {variable} to a key file, run "
            f"`gcloud auth application-default login`, or on GKE bind the pod's service account by Workload Identity"
        )
    if _code(error) == 403:
        return (
            f"{root}: this account may not do that: {_first_line(error)}. Grant it roles/storage.objectUser on the bucket, or "
            f"let {variable} or Workload Identity name another account"
        )
    if _code(error) == 404:
        return f"{root}: there is no such bucket; create it first"
    return None


def _unreachable(root: str, patience_s: float, cause: Exception) -> str:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    where = f"STORAGE_EMULATOR_HOST={emulator}: is anything listening there?" if emulator else "check DNS, proxy and firewall"
    return (
        f"{root} could not be reached for {patience_s:.0f} s: {type(cause).__name__}: {_first_line(cause)}. {where}. "
        f"Nothing was published; run again: what is stored is kept"
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:300]


@contextmanager
def _blob(root: str, path: str) -> Iterator[Any]:
    """An object by google-cloud-storage: gcsfs cannot demand a generation."""
    from google.cloud import storage

    bucket, _, prefix = root.split("://", 1)[1].partition("/")
    client = storage.Client(project="none")  # a project is needed to make buckets, not to use them
    try:
        yield client.bucket(bucket).blob(f"{prefix}/{path}" if prefix else path)
    finally:
        client.close()


def _read_blob(root: str, path: str) -> Pointer:
    from google.api_core.exceptions import NotFound, PreconditionFailed

    with _blob(root, path) as blob:
        while True:
            try:
                blob.reload(retry=None)
                data = blob.download_as_bytes(if_generation_match=blob.generation, retry=None)
            except NotFound:
                return Pointer()
            except PreconditionFailed:  # moved in between
                continue
            return Pointer(json.loads(data), str(blob.generation))


def _write_blob(root: str, path: str, data: bytes, generation: int) -> bool:
    """Write if the object has this generation (0: is not there); False if it has another."""
    from google.api_core.exceptions import PreconditionFailed

    with _blob(root, path) as blob:
        try:
            blob.upload_from_string(data, content_type="application/json", if_generation_match=generation, retry=None)
        except PreconditionFailed:
            return False
        return True


def _modified(info: dict[str, Any]) -> float:
    when = info.get("mtime") or info.get("updated") or info.get("created")
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    return when.timestamp() if isinstance(when, datetime) else float(when or 0)
