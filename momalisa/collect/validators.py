"""What hosts said about the versions of their pictures (ETag, Last-Modified), so that they can be asked "still the same?".

    <dataset>/state/validators/<hash of the images table>.json    {id: {"etag": ..., "last_modified": ...}}

Hosts change these without changing a picture, so no table and no manifest knows them: they lie beside the dataset, one
file for each images table, and losing one costs no more than asking for its pictures again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from momalisa.collect.fetched import Validators
from momalisa.storage import Store


def _place(table: str) -> str:
    return f"state/validators/{PurePosixPath(table).stem}.json"


def read(store: Store, table: str) -> dict[str, Validators]:
    """id -> validators of an images table's pictures; empty if nothing is known."""
    try:
        return {id: Validators(**said) for id, said in store.read_json(_place(table)).items()}
    except FileNotFoundError:
        return {}


def add(store: Store, table: str, said: Mapping[str, Validators]) -> None:
    """Remember what was said about a table's pictures, if only that nothing was, beside what is known of others."""
    if not said:
        return
    known = {**read(store, table), **said}
    rows = {id: {"etag": one.etag, "last_modified": one.last_modified} for id, one in known.items()}
    store.write_json(_place(table), rows)
