"""A collection file as it was last fetched, so that one that has not changed is not fetched again.

    <dataset>/state/sources/<hash of its address>.json    its validators, and which copy they belong to; written last
    <dataset>/state/sources/<sha256>.csv                  the copy

Like the validators of pictures they lie beside the dataset: no manifest names them, and losing them costs one download.
"""

from __future__ import annotations

import hashlib
from typing import Any, BinaryIO

from momalisa.collect.fetched import NOTHING_SAID, Validators
from momalisa.storage import Store

FOLDER = "state/sources"


class Copy:
    """What is kept of one address."""

    def __init__(self, store: Store, url: str) -> None:
        self.store, self._record = store, f"{FOLDER}/{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
        self._path, self.said = self._read()

    def _read(self) -> tuple[str, Validators]:
        try:
            record = self.store.read_json(self._record)
        except FileNotFoundError:
            return "", NOTHING_SAID
        if not self.store.exists(record["copy"]):
            return "", NOTHING_SAID
        return record["copy"], Validators(record["etag"], record["last_modified"])

    def read(self, file: BinaryIO) -> None:
        """Copy it into a file."""
        self.store.get_file(self._path, file)

    def keep(self, file: BinaryIO, said: Validators) -> None:
        """Remember a file as what the host has now; without validators there is nothing to ask it by."""
        if not said:
            return
        file.seek(0)
        readable: Any = file  # typeshed asks for `readinto`, which BinaryIO does not promise
        path = f"{FOLDER}/{hashlib.file_digest(readable, 'sha256').hexdigest()[:32]}.csv"
        if path != self._path:
            self.store.put_file(path, file)
        self.store.write_json(self._record, {"copy": path, "etag": said.etag, "last_modified": said.last_modified})
        if self._path not in ("", path):
            self.store.delete(self._path)
