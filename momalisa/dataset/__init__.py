"""A dataset's versions: immutable manifests that name column families, and one pointer to the latest.

    <dataset>/images/<hash>.parquet
    <dataset>/duplicates/<hash>.parquet
    <dataset>/captions/<captioner-id>/<hash>.parquet
    <dataset>/edits/<hash>.parquet
    <dataset>/latents/<encoder-id>/<hash>.parquet
    <dataset>/manifests/<sha256>.json
    <dataset>/refs/latest

A stage writes its new tables, then a manifest that names them, and moves `refs/latest` last: a stage that is
killed leaves files that nobody reads. A manifest holds no time and no run id, so the same content has the same hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from momalisa.records import OK
from momalisa.storage import Store, canonical_json

FORMAT = 1
READERS = 16  # threads that read tables' small columns


class Place(NamedTuple):
    """Where a work's row is, and whether it is usable."""

    table: str
    ok: bool


@dataclass(frozen=True)
class Version:
    """What belongs together: the tables of each column family, by their paths."""

    images: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()  # one table at most: works that are another work's picture again
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)  # captioner id -> tables
    edits: tuple[str, ...] = ()  # one table at most: captions that a curator wrote
    latents: dict[str, tuple[str, ...]] = field(default_factory=dict)  # encoder id -> tables

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "images": sorted(self.images),
            "duplicates": sorted(self.duplicates),
            "captions": {key: sorted(paths) for key, paths in self.captions.items()},
            "edits": sorted(self.edits),
            "latents": {key: sorted(paths) for key, paths in self.latents.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Version:
        if value.get("format") != FORMAT:
            raise ValueError(
                f"manifest format {value.get('format')!r} is not {FORMAT}: this dataset was written by another release"
            )
        return cls(
            images=tuple(value["images"]),
            duplicates=tuple(value["duplicates"]),
            captions={key: tuple(paths) for key, paths in value["captions"].items()},
            edits=tuple(value["edits"]),
            latents={key: tuple(paths) for key, paths in value["latents"].items()},
        )

    @property
    def sha256(self) -> str:
        return hashlib.sha256(canonical_json(self.as_json())).hexdigest()

    def with_images(self, paths: list[str]) -> Version:
        return replace(self, images=tuple(sorted({*self.images, *paths})))

    def with_captions(self, captioner_id: str, paths: list[str]) -> Version:
        known = self.captions.get(captioner_id, ())
        return replace(self, captions={**self.captions, captioner_id: tuple(sorted({*known, *paths}))})

    def with_latents(self, encoder_id: str, paths: list[str]) -> Version:
        known = self.latents.get(encoder_id, ())
        return replace(self, latents={**self.latents, encoder_id: tuple(sorted({*known, *paths}))})


class Dataset:
    """A collection in a store: read its latest version, add to it, publish."""

    def __init__(self, root: str) -> None:
        self.store = Store(root)

    def latest(self) -> Version:
        """The published version; an empty one if nothing was ever published."""
        if not self.store.exists("refs/latest"):
            return Version()
        pointer = self.store.read_json("refs/latest")
        return Version.from_json(self.store.read_json(pointer["manifest"]))

    def publish(self, version: Version) -> str:
        """Write the manifest, then move `refs/latest` to it; returns the manifest's hash."""
        digest = version.sha256
        path = f"manifests/{digest}.json"
        if not self.store.exists(path):
            self.store.write_json(path, version.as_json())
        self.store.write_json("refs/latest", {"manifest": path})
        return digest

    def rows(self, paths: tuple[str, ...] | list[str], columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of some tables, in order of path and row."""
        for path in sorted(paths):
            yield from self.store.get_table(path, columns).to_pylist()

    def ids(self, paths: tuple[str, ...] | list[str], only_ok: bool = False) -> set[str]:
        """The ids in some tables; `only_ok`: of rows without an error."""
        return {row["id"] for row in self.rows(paths, ["id", "status"]) if not only_ok or row["status"] == OK}

    def put_rows(self, folder: str, rows: list[dict[str, Any]], schema: pa.Schema) -> str:
        """Write rows, ordered by id, as one table; returns its path."""
        ordered = sorted(rows, key=lambda row: row["id"])
        return self.store.put_table(folder, pa.Table.from_pylist(ordered, schema=schema))

    def small_tables(self, paths: Iterable[str], names: list[str]) -> Iterator[tuple[str, pa.Table]]:
        """(path, some columns) of each table: of a bucket's tables nothing else is fetched."""

        def read(path: str) -> tuple[str, pa.Table]:
            with fsspec.open(self.store.url(path), "rb") as file:
                return path, pq.read_table(file, columns=names)

        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(read, sorted(paths))

    def places(self, paths: Iterable[str]) -> dict[str, Place]:
        """id -> where its row is. A million ids take about 100 MB."""
        found: dict[str, Place] = {}
        for path, table in self.small_tables(paths, ["id", "status"]):
            good, bad = Place(path, True), Place(path, False)  # one object for all rows of a table
            ids, states = table["id"].to_pylist(), table["status"].to_pylist()
            found.update((id, good if status == OK else bad) for id, status in zip(ids, states, strict=True))
        return found

    def without_works(self, version: Version, ids: Set[str]) -> tuple[Version, dict[str, str]]:
        """A version in which works have no row in images, captions and latents, for new rows to take their place.

        Tables are copied where they hold such a row, never changed. Also returns {images table: its copy}.
        What a curator wrote stays, and so do duplicates, which are found anew.
        """
        if not ids:
            return version, {}
        tables = [version.images, *version.captions.values(), *version.latents.values()]
        copies = self._copies({path for paths in tables for path in paths}, ids)

        def swapped(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(sorted({new for new in (copies.get(path, path) for path in paths) if new}))

        changed = replace(
            version,
            images=swapped(version.images),
            captions={key: swapped(paths) for key, paths in version.captions.items()},
            latents={key: swapped(paths) for key, paths in version.latents.items()},
        )
        return changed, {old: copies[old] for old in version.images if copies.get(old)}

    def _copies(self, paths: Iterable[str], ids: Set[str]) -> dict[str, str]:
        """{table that holds a row of `ids`: its copy without them, "" if no row is left}."""
        holders = [path for path, table in self.small_tables(paths, ["id"]) if not ids.isdisjoint(table["id"].to_pylist())]
        return {path: self._copy_without(path, ids) for path in holders}

    def _copy_without(self, path: str, ids: Set[str]) -> str:
        table = self.store.get_table(path)
        kept = table.filter(pc.invert(pc.is_in(table["id"], pa.array(sorted(ids), pa.string()))))
        return self.store.put_table(path.rsplit("/", 1)[0], kept) if kept.num_rows else ""
