"""The training set: captions and token ids in memory, moments mapped from the node's disk.

<folder>/<hash of the tables>.f16       all moments, one after another: the workers of a node share its pages
<folder>/<hash of the tables>.parquet   id, caption, token ids, place and shape of each row; written last
<folder>/lock                           held while a file is made, found or removed

Both are on the disk before they have their names, so what a power failure leaves is whole or fetched anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from momalisa.dataset import Dataset
from momalisa.records import OK
from momalisa.training import node


@dataclass(frozen=True)
class LatentCache:
    """Rows in order of id. 64 KiB of moments a row at 512x512, so 100,000 works are 6.4 GB on disk; with mirror images 13 GB."""

    ids: list[str]
    captions: list[str]
    moments: Sequence[torch.Tensor]  # N of [2C, H, W] float16: mean, log-variance; H and W differ between buckets
    token_ids: torch.Tensor  # [N, L] int64
    mirrored: Sequence[torch.Tensor] | None = field(default=None, kw_only=True)  # as `moments`, of the mirror images

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: list[int]) -> LatentCache:
        return LatentCache(
            ids=[self.ids[i] for i in indices],
            captions=[self.captions[i] for i in indices],
            moments=Taken(self.moments, indices),
            token_ids=self.token_ids[indices],
            mirrored=None if self.mirrored is None else Taken(self.mirrored, indices),
        )

    def without(self, ids: Collection[str]) -> LatentCache:
        """All rows but those of some works."""
        return self.rows([i for i, own in enumerate(self.ids) if own not in ids])

    def only(self, ids: Collection[str]) -> LatentCache:
        """The rows of some works."""
        return self.rows([i for i, own in enumerate(self.ids) if own in ids])

    def flipped(self, where: torch.Tensor) -> LatentCache:
        """The rows, with the moments of the mirror image `where` [N] bool says so. There must be mirror images."""
        assert self.mirrored is not None
        sides = zip(where.tolist(), self.moments, self.mirrored, strict=True)
        return replace(self, moments=[mirrored if flip else moments for flip, moments, mirrored in sides])

    def stacked(self) -> torch.Tensor:
        """The moments of rows of one shape: [N, 2C, H, W] float16."""
        return torch.stack(list(self.moments))

    def buckets(self) -> list[list[int]]:
        """The rows of each shape, in order of shape."""
        found: dict[tuple[int, ...], list[int]] = {}
        for index, moments in enumerate(self.moments):
            found.setdefault(tuple(moments.shape), []).append(index)
        return [found[shape] for shape in sorted(found)]


INDEX = pa.schema(
    [
        ("id", pa.string()),
        ("caption", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("start", pa.int64()),  # in values, not bytes
        ("shape", pa.list_(pa.int32())),  # [2C, H, W]; [2, 2C, H, W] where the mirror image follows
    ]
)


class Mapped(Sequence[torch.Tensor]):
    """Moments of a file: each is a view of the mapping, read from disk when it is looked at."""

    def __init__(self, path: Path, starts: list[int], shapes: list[tuple[int, ...]]) -> None:
        self._held = open(path, "rb")  # noqa: SIM115  # its shared lock says that the file is in use, until this process ends
        fcntl.flock(self._held, fcntl.LOCK_SH)
        self.values = torch.from_file(str(path), shared=False, size=path.stat().st_size // 2, dtype=torch.float16)
        self.starts, self.shapes = starts, shapes

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        start, shape = self.starts[index], self.shapes[index]
        return self.values[start : start + math.prod(shape)].view(shape)

    def __del__(self) -> None:
        if held := getattr(self, "_held", None):
            held.close()


@dataclass(frozen=True)
class Taken(Sequence[torch.Tensor]):
    """Some of the moments of a whole, in an order of their own."""

    whole: Sequence[torch.Tensor]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.whole[self.indices[index]]


def load(dataset: Dataset, tables: Sequence[str], folder: Path) -> LatentCache:
    """Every good row of some latents tables. The first process of a node fetches them; the others wait and share its file.

    Files of other tables that no process uses any more are removed. Raises ValueError where there is no good row, and
    OSError where the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256("\n".join([dataset.store.root, *sorted(tables)]).encode()).hexdigest()[:24]
    with node.locked(folder / "lock"):
        index = folder / f"{name}.parquet"
        rows = _kept(index)
        if rows is None:
            _sweep(folder)
            rows = _fetch(dataset, tables, folder, name)
        moments, mirrored = _sides(index.with_suffix(".f16"), rows)
    token_ids = torch.tensor(rows["token_ids"].combine_chunks().flatten().to_numpy(), dtype=torch.int64).view(len(rows), -1)
    return LatentCache(rows["id"].to_pylist(), rows["caption"].to_pylist(), moments, token_ids, mirrored=mirrored)


def _kept(index: Path) -> pa.Table | None:
    """The index of a file that is there and as long as it says; else None."""
    if not index.exists():
        return None
    try:
        rows, moments = pq.read_table(index), index.with_suffix(".f16")
    except pa.ArrowInvalid:  # it was cut short
        return None
    size = 2 * sum(math.prod(shape) for shape in rows["shape"].to_pylist())
    return rows if moments.exists() and moments.stat().st_size == size else None


def _sides(path: Path, rows: pa.Table) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor] | None]:
    """The moments of a file, and those of the mirror images where it has them."""
    starts, shapes = rows["start"].to_pylist(), [tuple(shape) for shape in rows["shape"].to_pylist()]
    if len(shapes[0]) == 3:
        return Mapped(path, starts, shapes), None
    shapes, count = [shape[1:] for shape in shapes], len(rows)
    behind = [start + math.prod(shape) for start, shape in zip(starts, shapes, strict=True)]
    both = Mapped(path, starts + behind, shapes + shapes)
    return Taken(both, list(range(count))), Taken(both, list(range(count, 2 * count)))


def _fetch(dataset: Dataset, tables: Sequence[str], folder: Path, name: str) -> pa.Table:
    """Write the moments' file a table at a time, then its index, which is returned."""
    made, rows, start = folder / f"{name}.making", [], 0
    try:
        with open(made, "wb") as file:
            for row in dataset.rows(list(tables)):
                if row["status"] != OK:
                    continue
                shape: tuple[int, ...] = (2 * row["channels"], row["height"], row["width"])
                file.write(row["moments"])
                if "mirrored" in row:
                    shape = (2, *shape)
                    file.write(row["mirrored"])
                rows.append({key: row[key] for key in ("id", "caption", "token_ids")} | {"start": start, "shape": shape})
                start += math.prod(shape)
        if not rows:
            raise ValueError(f"{dataset.store.root}: no work was encoded without an error; see the encode job's rejected rows")
        rows.sort(key=lambda row: str(row["id"]))
        _name(made, folder / f"{name}.f16")
        index = pa.Table.from_pylist(rows, schema=INDEX)
        pq.write_table(index, made)
        _name(made, folder / f"{name}.parquet")
        return index
    except OSError as error:
        raise OSError(f"the latents could not be kept in {folder} ({error}); free space or set train.cache_dir") from error
    finally:
        made.unlink(missing_ok=True)


def _name(made: Path, place: Path) -> None:
    """Give a file its name once the disk has all of it; then the disk has the name too."""
    _to_disk(made)
    made.rename(place)
    _to_disk(place.parent)


def _to_disk(path: Path) -> None:
    """Wait until the disk has all of a file, or the names in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _sweep(folder: Path) -> None:
    """Remove what no living process holds, of the files that are made here. Called with the folder's lock."""
    for path in folder.glob("[0-9a-f]" * 24 + ".f16"):
        with open(path, "rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.with_suffix(".parquet").unlink(missing_ok=True)
            path.unlink()
