"""A dataset's versions: immutable manifests that name column families, and one pointer to the latest.

    <dataset>/images/<hash>.parquet
    <dataset>/duplicates/<hash>.parquet
    <dataset>/captions/<captioner-id>/<hash>.parquet
    <dataset>/edits/<hash>.parquet
    <dataset>/latents/<encoder-id>/<hash>.parquet
    <dataset>/manifests/<sha256>.json
    <dataset>/refs/log/<sequence>.json
    <dataset>/refs/latest

A stage writes its new tables, then a manifest that names them, and moves `refs/latest` last: a stage that is
killed leaves files that nobody reads. A manifest holds no time and no run id, so the same content has the same hash.

The pointer itself is the newest entry of the log. Before it is moved on, what it says is copied to `refs/log`: so the
log holds every publication and nothing that was not published, wherever a process dies.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from momalisa.storage import Pointer, Store, canonical_json, side_by_side

if TYPE_CHECKING:  # not needed for `--help`
    import pyarrow as pa

    from momalisa.dataset.corrections import Corrections

FORMAT = 1
LATEST = "refs/latest"
ATTEMPTS = 30  # to move the pointer, when other runs move it too
COPIES = 4  # whole tables, pictures among them, that are read and written at a time


class Conflict(ValueError):
    """Another run published in between, and its change and ours do not go together."""


class Place(NamedTuple):
    """Where a work's row is, whether it is usable, and what it says: as hashes that hold in this process alone."""

    table: str
    ok: bool
    told: int | None = None  # of its TOLD, in order; None: nobody looked
    address: int | None = None  # of its image_url


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

    def families(self) -> dict[str, tuple[str, ...]]:
        """{folder: tables}: `images`, `duplicates`, `captions/<captioner id>`, `edits`, `latents/<encoder id>`."""
        several = [("captions", self.captions), ("latents", self.latents)]
        named = {f"{family}/{key}": paths for family, tables in several for key, paths in tables.items()}
        return {"images": self.images, "duplicates": self.duplicates, "edits": self.edits, **named}

    def paths(self) -> set[str]:
        """Every table."""
        return {path for tables in self.families().values() for path in tables}

    def with_tables(self, folder: str, paths: Iterable[str], instead_of: Iterable[str] = ()) -> Version:
        """More tables in a family; `instead_of`: tables that they take the place of."""
        tables = tuple(sorted((set(self.families().get(folder, ())) - set(instead_of)) | set(paths)))
        family, _, key = folder.partition("/")
        change: Any = {family: {**getattr(self, family), key: tables} if key else tables}
        return replace(self, **change)

    def with_images(self, paths: Iterable[str]) -> Version:
        return self.with_tables("images", paths)

    def with_captions(self, captioner_id: str, paths: Iterable[str]) -> Version:
        return self.with_tables(f"captions/{captioner_id}", paths)

    def with_latents(self, encoder_id: str, paths: Iterable[str]) -> Version:
        return self.with_tables(f"latents/{encoder_id}", paths)


@dataclass(frozen=True)
class Publication:
    """One move of `refs/latest`."""

    sequence: int
    sha256: str  # the manifest's
    time: str  # UTC, ISO 8601

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Publication:
        digest = value["manifest"].removeprefix("manifests/").removesuffix(".json")
        return cls(value.get("sequence", 1), digest, value.get("time", ""))


class Dataset:
    """A collection in a store: read its latest version, add to it, publish."""

    def __init__(self, root: str) -> None:
        self.store = Store(root)

    def latest(self) -> Version:
        """The published version; an empty one if nothing was ever published."""
        return self._named(self.store.read_pointer(LATEST))

    def _named(self, pointer: Pointer) -> Version:
        return self.read(Publication.from_json(pointer.value).sha256) if pointer.value else Version()

    def read(self, digest: str) -> Version:
        """The version with this hash. Raises ValueError if the manifest holds something else."""
        path = f"manifests/{digest}.json"
        version = Version.from_json(self.store.read_json(path))
        if version.sha256 != digest:
            raise ValueError(f"{self.store.url(path)} was changed: its content has sha256 {version.sha256[:12]}...")
        return version

    def log(self) -> list[Publication]:
        """Every publication, newest first; a version that was published again is there again."""
        pointer = self.store.read_pointer(LATEST).value  # before the older ones, else one could be moved past us
        if pointer is None:
            return []
        older = side_by_side(self.store.read_json, self.store.list("refs/log"))
        found = {entry.sequence: entry for entry in map(Publication.from_json, [*older, pointer])}
        return [found[sequence] for sequence in sorted(found, reverse=True)]

    def published(self) -> list[str]:
        """Hashes of the versions that can be read, newest first: published, and not deleted."""
        there = set(self.store.list("manifests"))
        digests = dict.fromkeys(entry.sha256 for entry in self.log())
        return [digest for digest in digests if f"manifests/{digest}.json" in there]

    def resolve(self, name: str) -> str:
        """`latest`, or the beginning of a published version's hash -> the whole hash. Raises ValueError."""
        published = self.published()
        if not published:
            raise ValueError(f"{self.store.root} holds no version: run the collect job first")
        found = published[:1] if name == "latest" else [digest for digest in published if digest.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{name} begins {len(found)} versions ({', '.join(d[:12] for d in found[:4])}): give more of it")
        raise ValueError(f"{name} is no published version of {self.store.root}; `dataset log` lists them")

    def publish(self, version: Version, expected: Version | None = None) -> str:
        """Write the manifest, then move `refs/latest` to it; returns the manifest's hash.

        Raises Conflict if another version than `expected` is the latest by then (None: whichever it is, it is replaced).
        """

        def change(latest: Version) -> Version:
            if expected is not None and latest.sha256 != expected.sha256:
                raise Conflict(
                    f"{self.store.root}: another run published version {latest.sha256[:12]} in the meantime; "
                    f"run again: it goes on from there, and the tables of this run are kept"
                )
            return version

        return self.update(change)

    def update(self, change: Callable[[Version], Version]) -> str:
        """Publish what `change` makes of the latest version; returns its hash.

        If another run publishes in between, `change` is asked again with what that run has made: so additions to
        different families, or of different works, are all kept. A Conflict that `change` raises passes.
        """
        for attempt in range(ATTEMPTS):
            seen = self.store.read_pointer(LATEST)
            latest = self._named(seen)
            version = change(latest)
            if self._move(seen, latest, version):
                return version.sha256
            time.sleep(random.uniform(0, 0.05 * 2 ** min(attempt, 6)))
        raise Conflict(f"{self.store.root}: other runs publish all the time; run again: the tables of this run are kept")

    def _move(self, seen: Pointer, latest: Version, version: Version) -> bool:
        path = f"manifests/{version.sha256}.json"
        if seen.value and seen.value["manifest"] == path:
            return True
        if missing := self.store.missing(version.paths() - latest.paths()):
            raise ValueError(
                f"{self.store.root}: {len(missing)} tables of this version are missing, for example {missing[0]}; nothing was "
                f"published. Run again (or, for a version of another place, check it out with --from)"
            )
        self.store.write_json(path, version.as_json())
        sequence = 0
        if seen.value:
            sequence = Publication.from_json(seen.value).sequence
            self.store.write_json(f"refs/log/{sequence:08d}.json", seen.value)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return self.store.move_pointer(LATEST, {"manifest": path, "sequence": sequence + 1, "time": now}, seen)

    def add(self, folder: str, paths: Iterable[str], began: Version, instead_of: Iterable[str] = ()) -> str:
        """Publish new tables of a family, made by a run that `began` at a version; returns the new version's hash.

        Works that another run has added to the family since then: their captions or latents are left to it. Works whose
        picture or words another run has replaced since then are left out: they lack a row again. Two collections of the same
        works are a Conflict.
        """
        return self.update(lambda latest: self.added(latest, folder, paths, began, instead_of))

    def added(
        self, latest: Version, folder: str, paths: Iterable[str], began: Version, instead_of: Iterable[str] = ()
    ) -> Version:
        """What `add` makes of the latest version; nothing is published."""
        ours = set(paths)
        theirs = set(latest.families().get(folder, ())) - set(began.families().get(folder, ())) - ours
        taken = self.ids(theirs) if theirs else set()
        if folder != "images":
            from momalisa.records import DETAILS

            taken |= self.replaced(began, latest, ("sha256", *DETAILS))
        return latest.with_tables(folder, self._apart(folder, ours, taken), instead_of)

    def replaced(self, began: Version, latest: Version, columns: Iterable[str]) -> set[str]:
        """Works of which one version says something else in these columns of images than the one before it did."""
        gone, new = set(began.images) - set(latest.images), set(latest.images) - set(began.images)
        if not gone:
            return set()
        names = ["id", *columns]
        now = {tuple(row.values()) for row in self.small_rows(new, names)}
        return {row["id"] for row in self.small_rows(gone, names) if tuple(row.values()) not in now}

    def _apart(self, folder: str, ours: set[str], taken: set[str]) -> set[str]:
        """Our tables without the works that are taken."""
        if not taken or not (both := taken & self.ids(ours)):
            return ours
        if folder == "images":
            raise Conflict(
                f"{self.store.root}: another run has collected {len(both)} of these works in the meantime, for example "
                f"{min(both)}; nothing was published. Run again: what is there is passed by"
            )
        tables = {path: self.without(self.store.get_table(path), both) for path in sorted(ours)}
        return {self.store.put_table(folder, table) for table in tables.values() if table.num_rows}

    @staticmethod
    def without(table: pa.Table, ids: Set[str]) -> pa.Table:
        """The table without the rows of these ids."""
        return table.filter([id not in ids for id in table["id"].to_pylist()])

    def rows(self, paths: Iterable[str], columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of some tables, in order of path and row, a table at a time; of `columns` nothing else is fetched."""
        for path in sorted(paths):
            table = self.store.get_table(path) if columns is None else self.store.get_columns(path, columns)
            yield from table.to_pylist()

    def tables(self, paths: Iterable[str], names: list[str] | None = None) -> list[pa.Table]:
        """Some columns of each table (None: all but pictures and moments), in order of path.

        Nothing else is fetched; tables are read side by side.
        """
        return list(side_by_side(lambda path: self.store.get_columns(path, names), sorted(paths)))

    def columns(self, paths: Iterable[str], names: list[str] | None = None) -> list[list[dict[str, Any]]]:
        """The rows of `tables`."""
        return [table.to_pylist() for table in self.tables(paths, names)]

    def ids(self, paths: Iterable[str], only_ok: bool = False) -> set[str]:
        """The ids in some tables; `only_ok`: of rows without an error."""
        from momalisa.records import OK

        return {row["id"] for row in self.small_rows(paths, ["id", "status"]) if not only_ok or row["status"] == OK}

    def edits(self, version: Version) -> dict[str, str]:
        """{id: caption} that a curator wrote."""
        return {row["id"]: row["caption"] for rows in self.columns(version.edits) for row in rows}

    def texts(self, version: Version, captioner_id: str, column: str = "short") -> dict[str, str]:
        """{id: caption} that training uses: a curator's where there is one, else the captioner's.

        Works that are another work's picture again have none.
        """
        from momalisa.records import OK

        rows = self.small_rows(version.captions.get(captioner_id, ()), ["id", column, "status"])
        texts = {row["id"]: row[column] for row in rows if row["status"] == OK}
        texts |= self.edits(version)
        again = self.duplicates(version)
        return {id: text for id, text in texts.items() if id not in again}

    def duplicates(self, version: Version) -> set[str]:
        """The ids of works that are another work's picture again."""
        return {row["id"] for rows in self.columns(version.duplicates, ["id"]) for row in rows}

    def put_rows(self, folder: str, rows: list[dict[str, Any]], schema: pa.Schema) -> str:
        """Write rows, ordered by id, as one table; returns its path."""
        import pyarrow as pa

        ordered = sorted(rows, key=lambda row: row["id"])
        return self.store.put_table(folder, pa.Table.from_pylist(ordered, schema=schema))

    def small_tables(self, paths: Iterable[str], names: list[str]) -> Iterator[tuple[str, pa.Table]]:
        """(path, some columns) of each table, in order of path: nothing else is fetched."""
        yield from side_by_side(lambda path: (path, self.store.get_columns(path, names)), sorted(paths))

    def small_rows(self, paths: Iterable[str], names: list[str]) -> Iterator[dict[str, Any]]:
        """The rows of `small_tables`, a table at a time."""
        for _, table in self.small_tables(paths, names):
            yield from table.to_pylist()

    def places(self, paths: Iterable[str]) -> dict[str, Place]:
        """id -> where its row is. A million ids take about 100 MB."""
        from momalisa.records import OK

        found: dict[str, Place] = {}
        for path, table in self.small_tables(paths, ["id", "status"]):
            good, bad = Place(path, True), Place(path, False)  # one object for all rows of a table
            ids, states = table["id"].to_pylist(), table["status"].to_pylist()
            found.update((id, good if status == OK else bad) for id, status in zip(ids, states, strict=True))
        return found

    def told_places(self, paths: Iterable[str]) -> dict[str, Place]:
        """`places`, and what the rows say. A million ids take about 250 MB."""
        from momalisa.records import OK, TOLD

        found: dict[str, Place] = {}
        for path, table in self.small_tables(paths, ["id", "status", "image_url", *TOLD]):
            columns = (table[name].to_pylist() for name in ("id", "status", "image_url", *TOLD))
            for id, status, address, *told in zip(*columns, strict=True):
                found[id] = Place(path, status == OK, hash(tuple(told)), hash(address))
        return found

    def without_works(
        self, version: Version, ids: Set[str], kept: Set[str] = frozenset(), corrections: Corrections | None = None
    ) -> tuple[Version, dict[str, str]]:
        """A version in which works have no row in images, captions and latents, for new rows to take their place.

        `kept`: of these works, those whose captions and latents stay; `corrections`: those whose row in images stays, but
        with other words.
        Tables are copied where they hold such a row, never changed. Also returns {images table: its copy}.
        What a curator wrote stays, and so do duplicates, which are found anew.
        """
        if not ids:
            return version, {}
        derived = {path for paths in (*version.captions.values(), *version.latents.values()) for path in paths}
        copies = self._copies(version.images, ids, corrections) | self._copies(derived, ids - kept)

        def swapped(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(sorted({new for new in (copies.get(path, path) for path in paths) if new}))

        changed = replace(
            version,
            images=swapped(version.images),
            captions={key: swapped(paths) for key, paths in version.captions.items()},
            latents={key: swapped(paths) for key, paths in version.latents.items()},
        )
        return changed, {old: copies[old] for old in version.images if copies.get(old)}

    def _copies(self, paths: Iterable[str], ids: Set[str], corrections: Corrections | None = None) -> dict[str, str]:
        """{table that holds a row of `ids`: its copy without them, but for those that are corrected, "" if no row is left}."""
        holders = [path for path, table in self.small_tables(paths, ["id"]) if not ids.isdisjoint(table["id"].to_pylist())]
        gone = ids - corrections.ids if corrections else ids
        copies = side_by_side(lambda path: self._copy_without(path, gone, corrections), holders, COPIES)
        return dict(zip(holders, copies, strict=True))

    def _copy_without(self, path: str, ids: Set[str], corrections: Corrections | None) -> str:
        kept = self.without(self.store.get_table(path), ids)
        made = corrections.made(kept) if corrections else kept
        return self.store.put_table(path.rsplit("/", 1)[0], made) if made.num_rows else ""
