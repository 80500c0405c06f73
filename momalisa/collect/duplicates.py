"""The same picture twice: found by its hash, or nominated by its perceptual hash and confirmed by its thumbnail.

    same sha256                                                  exact
    pHash within RADIUS bits, then one of                        near
      a copy:          same proportions, thumbnails equal all over (resized, recompressed)
      a reproduction:  much the same proportions, two large and detailed pictures whose thumbnails correlate
                       (photographed again, cropped a little, in other light)

Thumbnails are in colour, because a red square and a blue one are two works. A reproduction must be rich in tones:
of two simple drawings in a few flat colours, nobody can say whether the light or the artist changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from momalisa.collect.phash import THUMBNAIL_BYTES
from momalisa.dataset import Dataset, Version
from momalisa.records import DUPLICATES, OK

EXACT, NEAR = "exact", "near"
RADIUS = 8  # bits of 64
COPY_ASPECT = 0.04  # of the ratio of two aspect ratios, as a natural logarithm: rounding at about 50 px
COPY_MAX = 28  # levels of 255 by which any place of a copy's thumbnail may differ, in any channel
COPY_MEAN = 3.5  # levels by which a copy's thumbnail may differ in the mean
REPRODUCTION_ASPECT = 0.25
REPRODUCTION_PX = 256  # the short side at least
REPRODUCTION_TONES = 6.0  # bits of entropy of a thumbnail's colours
REPRODUCTION_CORRELATION = 0.88
COLUMNS = ("id", "sha256", "phash", "width", "height", "thumbnail")
BLOCKS = 11  # RADIUS flipped bits spare 3 of 11 blocks of bits
AT_A_TIME = 1 << 14  # pairs that are confirmed together
READERS = 16  # threads that read tables

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]
Pairs = tuple[Indices, Indices]


@dataclass(frozen=True)
class Looks:
    """N pictures as arrays, in the order in which a work is preferred: the largest first, then by id."""

    ids: list[str]
    sha256: npt.NDArray[np.str_]
    phash: Hashes
    width: npt.NDArray[np.float64]
    height: npt.NDArray[np.float64]
    thumbnail: npt.NDArray[np.uint8]  # [N, 768]

    @classmethod
    def of(cls, table: pa.Table) -> Looks:
        """Raises ValueError for a row without a look."""
        sizes = pa.table({"id": table["id"], "pixels": pc.multiply(table["width"].cast("int64"), table["height"].cast("int64"))})
        table = table.take(pc.sort_indices(sizes, [("pixels", "descending"), ("id", "ascending")])).combine_chunks()
        hashes, thumbnails = table["phash"].to_pylist(), table["thumbnail"].to_pylist()
        for id, phash, thumbnail in zip(table["id"].to_pylist(), hashes, thumbnails, strict=True):
            if len(phash) != 16 or len(thumbnail) != THUMBNAIL_BYTES:
                raise ValueError(f"{id} has no perceptual hash and thumbnail: an earlier release collected it; collect again")
        return cls(
            ids=table["id"].to_pylist(),
            sha256=np.array(table["sha256"].to_pylist(), np.str_),
            phash=np.array([int(phash, 16) for phash in hashes], np.uint64),
            width=table["width"].to_numpy().astype(np.float64),
            height=table["height"].to_numpy().astype(np.float64),
            thumbnail=np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL_BYTES),
        )


def find(table: pa.Table) -> pa.Table:
    """The works that are another one's picture again, ordered by id, and what each is a duplicate of.

    `table` has COLUMNS. Of works that are one and the same the largest is kept, and of equally large ones that with
    the smallest id. The order of rows does not matter.
    """
    looks = Looks.of(table)
    kept = _Union(len(looks.ids))
    first = _first_of_each(looks.sha256)
    for index, original in enumerate(first.tolist()):
        kept.join(index, original)
    leaders = _leaders(looks, np.unique(first), kept)
    for left, right in candidates(looks.phash, leaders):
        _join(kept, looks, left, right)
    return _table(looks, np.array([kept.root(index) for index in range(len(looks.ids))], np.int64))


def _join(kept: _Union, looks: Looks, left: Indices, right: Indices) -> Flags:
    """Join those pairs that are the same picture, and say which they were."""
    same = confirmed(looks, left, right)
    for one, other in zip(left[same].tolist(), right[same].tolist(), strict=True):
        kept.join(one, other)
    return same


def _leaders(looks: Looks, rows: Indices, kept: _Union) -> Indices:
    """Of the rows with equal perceptual hashes those that are not the same as one before them; the others are joined.

    So a thousand empty pages cost a thousand comparisons, not a million.
    """
    leaders: list[int] = []
    order = rows[np.argsort(looks.phash[rows], kind="stable")]
    for group in np.split(order, np.flatnonzero(np.diff(looks.phash[order])) + 1):
        rest = group
        while len(rest):
            leaders.append(int(rest[0]))
            rest = rest[1:][~_join(kept, looks, np.repeat(rest[:1], len(rest) - 1), rest[1:])] if len(rest) > 1 else rest[1:]
    return np.array(leaders, np.int64)


def _first_of_each(sha256: npt.NDArray[np.str_]) -> Indices:
    """For each row the first row with the same content; a row without a hash of its content is its own."""
    _, first, inverse = np.unique(sha256, return_index=True, return_inverse=True)
    found: Indices = np.where(sha256 == "", np.arange(len(sha256)), first[inverse])
    return found


def _table(looks: Looks, kept: Indices) -> pa.Table:
    again = np.flatnonzero(kept != np.arange(len(kept)))
    originals = kept[again]
    exact = (looks.sha256[again] == looks.sha256[originals]) & (looks.sha256[again] != "")
    columns = [
        pa.array([looks.ids[index] for index in again], pa.string()),
        pa.array([looks.ids[index] for index in originals], pa.string()),
        pa.array(np.where(exact, EXACT, NEAR).tolist(), pa.string()),
        pa.array(np.bitwise_count(looks.phash[again] ^ looks.phash[originals]).astype(np.int32)),
        pa.array(np.round(_correlation(looks.thumbnail[again], looks.thumbnail[originals]), 4).astype(np.float32)),
    ]
    return pa.Table.from_arrays(columns, schema=DUPLICATES).sort_by("id")


class _Union:
    """Disjoint sets of 0..N-1; a set's root is its smallest member."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def root(self, index: int) -> int:
        while self.parent[index] != index:
            self.parent[index] = self.parent[self.parent[index]]
            index = self.parent[index]
        return index

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self.parent[high] = low


def candidates(phash: Hashes, among: Indices) -> Iterator[Pairs]:
    """All pairs of the rows `among` whose hashes differ, in RADIUS bits or fewer: each once, piece by piece."""
    order = among[np.argsort(phash[among], kind="stable")]
    unique, start, count = np.unique(phash[order], return_index=True, return_counts=True)
    for left, right in near_hashes(unique):
        single = (count[left] == 1) & (count[right] == 1)
        yield order[start[left[single]]], order[start[right[single]]]
        for one, other in zip(left[~single], right[~single], strict=True):
            rows, others = (order[start[k] : start[k] + count[k]] for k in (one, other))
            yield np.repeat(rows, len(others)), np.tile(others, len(rows))


def near_hashes(unique: Hashes) -> Iterator[Pairs]:
    """All pairs (as places) of different hashes within RADIUS bits, each once.

    The bits are cut into BLOCKS: RADIUS flipped bits leave at least BLOCKS - RADIUS of them alike, so hashes are sorted
    by every choice of so many blocks and compared with their neighbours (Norouzi et al. 2012 call it multi-index hashing).
    A pair is reported by the first such choice that brings it together.
    """
    masks = _blocks()
    for chosen in itertools.combinations(range(BLOCKS), BLOCKS - RADIUS):
        keys = unique & np.bitwise_or.reduce(masks[list(chosen)])
        order = np.argsort(keys, kind="stable")
        sorted_keys, hashes = keys[order], unique[order]
        places = np.arange(len(order))
        skipped = [masks[block] for block in range(chosen[-1]) if block not in chosen]
        for shift in itertools.count(1):
            places = places[: np.searchsorted(places, len(order) - shift)]
            places = places[sorted_keys[places] == sorted_keys[places + shift]]
            if not len(places):
                break
            flipped = hashes[places] ^ hashes[places + shift]
            near = np.bitwise_count(flipped) <= RADIUS
            for mask in skipped:
                near &= (flipped & mask) != 0
            if near.any():
                yield order[places[near]], order[places[near] + shift]


def _blocks() -> Hashes:
    """BLOCKS masks that share out the 64 bits, [BLOCKS]."""
    edges = [64 * block // BLOCKS for block in range(BLOCKS + 1)]
    return np.array([(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)], np.uint64)


def confirmed(looks: Looks, left: Indices, right: Indices) -> Flags:
    """Which pairs are the same picture, judged by proportions and thumbnails."""
    found = np.zeros(len(left), np.bool_)
    for begin in range(0, len(left), AT_A_TIME):
        piece = slice(begin, begin + AT_A_TIME)
        found[piece] = _confirmed(looks, left[piece], right[piece])
    return found


def _confirmed(looks: Looks, left: Indices, right: Indices) -> Flags:
    ratio = looks.width[left] * looks.height[right] / (looks.height[left] * looks.width[right])
    aspect = np.abs(np.log(ratio))
    one, other = looks.thumbnail[left], looks.thumbnail[right]
    difference = np.abs(one.astype(np.int16) - other)
    found: Flags = (aspect <= COPY_ASPECT) & (difference.max(1) <= COPY_MAX) & (difference.mean(1) <= COPY_MEAN)
    short = np.minimum.reduce([looks.width[left], looks.height[left], looks.width[right], looks.height[right]])
    large = ~found & (aspect <= REPRODUCTION_ASPECT) & (short >= REPRODUCTION_PX)
    for k in np.flatnonzero(large & (_correlation(one, other) >= REPRODUCTION_CORRELATION)):
        found[k] = min(tones(one[k]), tones(other[k])) >= REPRODUCTION_TONES
    return found


def _correlation(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Pearson's, over all places and channels of thumbnails [N, 768]; 0 where one has no contrast.

    The sums are whole numbers below 2**53, so their order does not matter: the result is the same everywhere.
    """
    a, b = one.astype(np.float64), other.astype(np.float64)
    n = a.shape[1]
    covariance = n * (a * b).sum(1) - a.sum(1) * b.sum(1)
    variances = (n * (a * a).sum(1) - a.sum(1) ** 2) * (n * (b * b).sum(1) - b.sum(1) ** 2)
    root = np.sqrt(variances)
    found: npt.NDArray[np.float64] = np.divide(covariance, root, out=np.zeros_like(root), where=root > 0)
    return found


def tones(thumbnail: npt.NDArray[np.uint8]) -> float:
    """How many bits name a place's colour, at 32 levels a channel: flat drawings up to 5.6, most paintings above 6.5."""
    coarse = (thumbnail.reshape(-1, 3) >> 3).astype(np.int64)  # [256, 3]
    share = np.unique(coarse @ np.array([1024, 32, 1]), return_counts=True)[1] / len(coarse)
    return float(-(share * np.log2(share)).sum())


def read(dataset: Dataset, images: tuple[str, ...] | list[str]) -> pa.Table:
    """COLUMNS of every picture in some images tables; an id in two tables is the first one's. Pictures are not fetched."""

    def one(path: str) -> pa.Table:
        with fsspec.open(dataset.store.url(path), "rb") as file:
            if missing := {*COLUMNS, "status"} - set(pq.read_schema(file).names):
                raise ValueError(f"{dataset.store.url(path)} lacks {sorted(missing)}: an earlier release wrote it; collect again")
            return pq.read_table(file, columns=[*COLUMNS], filters=pc.field("status") == OK)

    with ThreadPoolExecutor(READERS) as pool:
        tables = list(pool.map(one, sorted(images)))
    table = pa.concat_tables(tables)
    _, first = np.unique(np.array(table["id"].to_pylist(), np.str_), return_index=True)
    return table.take(np.sort(first))


def renewed(dataset: Dataset, version: Version, before: Version, policy: Literal["drop", "keep"]) -> Version:
    """A version with its duplicates found anew if its images are not those of the version `before`."""
    if policy == "keep" or not version.images:
        return replace(version, duplicates=())
    if version.images == before.images and before.duplicates:
        return version
    return replace(version, duplicates=(dataset.store.put_table("duplicates", find(read(dataset, version.images))),))


def known(dataset: Dataset, version: Version) -> dict[str, dict[str, Any]]:
    """The duplicates of a version: their rows by id."""
    return {row["id"]: row for row in dataset.rows(version.duplicates)}
