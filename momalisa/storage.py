"""Files in a folder or a bucket, written whole or not at all, and pointers that are moved last.

`Store` is a thin layer over fsspec: `out/demo`, `/data/moma` and `gs://bucket/moma` behave alike. A file is
visible only when complete (locally: a temporary file and a rename; object stores: one upload). Nothing is ever
changed in place but a `refs/` pointer.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import io
import json
import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq


class Store:
    """A root, local or `gs://`, and the few operations the stages need. Paths are relative, with slashes."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") if "://" in root else str(Path(root).absolute())
        self._fs, self._base = fsspec.core.url_to_fs(self.root)
        self.is_local = type(self._fs).__name__ == "LocalFileSystem"

    def __reduce__(self) -> tuple[Any, ...]:  # to workers as its root alone
        return (Store, (self.root,))

    def url(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(self._full(path)))

    def read_bytes(self, path: str) -> bytes:
        """Raises FileNotFoundError with the full address."""
        try:
            return bytes(self._fs.cat_file(self._full(path)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url(path)} does not exist") from error

    def write_bytes(self, path: str, data: bytes) -> None:
        target = self._full(path)
        if not self.is_local:
            self._fs.pipe_file(target, data)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)

    def delete(self, path: str) -> None:
        """A file that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._full(path))

    def read_json(self, path: str) -> Any:
        return json.loads(self.read_bytes(path))

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, canonical_json(value))

    def list(self, folder: str) -> builtins.list[str]:
        """Every file below a folder, relative to the root, sorted; partial writes are not files."""
        try:
            found = self._fs.find(self._full(folder))
        except FileNotFoundError:
            return []
        prefix = self._base.rstrip("/") + "/"
        return sorted(name.removeprefix(prefix) for name in found if not name.endswith(".partial"))

    def put_table(self, folder: str, table: pa.Table) -> str:
        """Write a table as `<folder>/<sha256 of its bytes>.parquet` and return that path."""
        data = parquet_bytes(table)
        path = f"{folder}/{hashlib.sha256(data).hexdigest()[:32]}.parquet"
        if not self.exists(path):
            self.write_bytes(path, data)
        return path

    def get_table(self, path: str, columns: builtins.list[str] | None = None) -> pa.Table:
        return pq.read_table(io.BytesIO(self.read_bytes(path)), columns=columns)

    def upload(self, directory: Path, folder: str) -> dict[str, str]:
        """Copy a local directory in; returns {relative name: sha256}."""
        hashes = {}
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            data = file.read_bytes()
            name = file.relative_to(directory).as_posix()
            hashes[name] = hashlib.sha256(data).hexdigest()
            self.write_bytes(f"{folder}/{name}", data)
        return hashes

    def download(self, folder: str, hashes: dict[str, str], directory: Path) -> Path:
        """Copy named files out, checking each hash; files already there and right are kept.

        Raises ValueError naming the file whose content is not what its manifest says.
        """
        for name, expected in hashes.items():
            target = directory / name
            if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == expected:
                continue
            data = self.read_bytes(f"{folder}/{name}")
            actual = hashlib.sha256(data).hexdigest()
            if actual != expected:
                raise ValueError(
                    f"{self.url(f'{folder}/{name}')} has sha256 {actual[:16]}..., its manifest says {expected[:16]}..."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
            partial.write_bytes(data)
            os.replace(partial, target)
        return directory


def canonical_json(value: Any) -> bytes:
    """One text for one value: sorted keys, UTF-8, a final newline."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def parquet_bytes(table: pa.Table) -> bytes:
    """The same rows give the same bytes: one row group, zstd, no metadata of ours or of pandas."""
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(None), sink, compression="zstd", row_group_size=max(table.num_rows, 1), store_schema=False
    )
    return sink.getvalue()
