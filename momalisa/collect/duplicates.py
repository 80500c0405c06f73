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
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from momalisa.collect.phash import THUMBNAIL_BYTES
from momalisa.dataset import Dataset, Version
from momalisa.records import DUPLICATES, OK
from momalisa.storage import side_by_side

EXACT, NEAR = "exact", "near"
RADIUS = 8  # bits of 64
COPY_ASPECT = 0.04  # of the ratio of two aspect ratios, as a natural logarithm: rounding at about 50 px
COPY_MAX = 28  # levels of 255 by which any place of a copy's thumbnail may differ, in any channel
COPY_MEAN = 3.5  # levels by which a copy's thumbnail may differ in the mean
REPRODUCTION_ASPECT = 0.25
REPRODUCTION_PX = 256  # the short side at least
REPRODUCTION_TONES = 6.0  # bits of entropy of a thumbnail's colours
REPRODUCTION_CORRELATION = 0.88
COLUMNS = ("id", "sha256", "phash", "width", "height")
BLOCKS = 11  # RADIUS flipped bits spare 3 of 11 blocks of bits
AT_A_TIME = 1 << 14  # pairs that are confirmed together
FACTS = np.dtype([("sha256", "S32"), ("phash", np.uint64), ("width", np.float64), ("height", np.float64)])

Facts = npt.NDArray[np.void]  # [N] of FACTS; of a sha256 the first 128 bits, in hex
Indices = npt.NDArray[np.int64]
Thumbnails = npt.NDArray[np.uint8]  # [N, 768]
Flags = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]
Pairs = tuple[Indices, Indices]


@dataclass(frozen=True)
class Looks:
    """N pictures as arrays, in the order in which a work is preferred: the largest first, then by id.

    Ids and thumbnails lie as they were read, and thumbnails may lie in a file: those of nominated pairs alone are looked at.
    """

    ids: pa.ChunkedArray
    sha256: npt.NDArray[np.bytes_]
    phash: Hashes
    width: npt.NDArray[np.float64]
    height: npt.NDArray[np.float64]
    places: Indices  # of their ids and thumbnails
    thumbnails: Thumbnails

    @classmethod
    def of(cls, ids: pa.ChunkedArray, facts: Facts, thumbnails: Thumbnails) -> Looks:
        """Rows in the order in which they were read; of an id that comes twice the first row alone is a picture."""
        places = _preferred(ids, facts)
        sha256, phash, width, height = (facts[name][places] for name in ("sha256", "phash", "width", "height"))
        return cls(ids, sha256, phash, width, height, places, thumbnails)

    def id(self, rows: Indices) -> pa.ChunkedArray:
        return self.ids.take(pa.array(self.places[rows]))

    def thumbnail(self, rows: Indices) -> Thumbnails:
        """Theirs, [len(rows), 768]."""
        return self.thumbnails[self.places[rows]]


def _preferred(ids: pa.ChunkedArray, facts: Facts) -> Indices:
    """Where each id was read first, the largest pictures first, then by id."""
    first = np.zeros(len(ids), np.bool_)
    first[_first_of_ids(ids)] = True
    sizes = pa.table({"id": ids, "pixels": facts["width"] * facts["height"]})
    order: Indices = pc.sort_indices(sizes, [("pixels", "descending"), ("id", "ascending")]).to_numpy().astype(np.int64)
    return order[first[order]]


def facts_of(table: pa.Table) -> Facts:
    """What of a table's COLUMNS is held while duplicates are looked for, 56 bytes a picture."""
    made = np.empty(len(table), FACTS)
    made["sha256"] = pc.utf8_slice_codeunits(table["sha256"], 0, 32).to_pylist()
    made["phash"] = np.frombuffer(bytes.fromhex("".join(table["phash"].to_pylist())), ">u8")
    made["width"], made["height"] = table["width"].to_numpy(), table["height"].to_numpy()
    return made


def find(looks: Looks) -> pa.Table:
    """The works that are another one's picture again, ordered by id, and what each is a duplicate of.

    Of works that are one and the same the largest is kept, and of equally large ones that with the smallest id.
    """
    first = _first_of_each(looks.sha256)
    originals, kept = np.flatnonzero(first == np.arange(len(first))), _Union(first)
    leaders = _leaders(looks, originals, kept)
    for left, right in candidates(looks.phash, leaders):
        _join(kept, looks, left, right)
    return _table(looks, kept.roots())


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
    order = rows[np.argsort(looks.phash[rows], kind="stable")]
    leads = np.ones(len(order), np.bool_)
    _, starts, counts = np.unique(looks.phash[order], return_index=True, return_counts=True)
    for start, count in zip(starts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        group = np.arange(start, start + count)
        while len(group) > 1:
            leader, others = order[group[:1]], group[1:]
            same = _join(kept, looks, np.repeat(leader, len(others)), order[others])
            leads[others[same]] = False
            group = others[~same]
    return order[leads]


def _first_of_each(sha256: npt.NDArray[np.bytes_]) -> Indices:
    """For each row the first row with the same content; a row without a hash of its content is its own."""
    order = np.argsort(sha256, kind="stable")  # so the first of equals comes first
    ordered, begins = sha256[order], np.ones(len(order), np.bool_)
    begins[1:] = ordered[1:] != ordered[:-1]
    found = np.empty_like(order)
    found[order] = order[begins][np.cumsum(begins) - 1]
    return np.where(sha256 == b"", np.arange(len(sha256)), found)


def _table(looks: Looks, kept: Indices) -> pa.Table:
    again = np.flatnonzero(kept != np.arange(len(kept)))
    originals = kept[again]
    exact = (looks.sha256[again] == looks.sha256[originals]) & (looks.sha256[again] != b"")
    columns = [
        looks.id(again),
        looks.id(originals),
        pa.array(np.where(exact, EXACT, NEAR).tolist(), pa.string()),
        pa.array(np.bitwise_count(looks.phash[again] ^ looks.phash[originals]).astype(np.int32)),
        pa.array(np.round(_correlation(looks.thumbnail(again), looks.thumbnail(originals)), 4).astype(np.float32)),
    ]
    return pa.Table.from_arrays(columns, schema=DUPLICATES).sort_by("id")


class _Union:
    """Disjoint sets of 0..N-1; a set's root is its smallest member."""

    def __init__(self, parent: Indices) -> None:
        """`parent`: a smaller member of its set for each, or itself where it is the smallest. It is changed in place."""
        self.parent = parent

    def root(self, index: int) -> int:
        while self.parent[index] != index:
            self.parent[index] = self.parent[self.parent[index]]
            index = int(self.parent[index])
        return index

    def roots(self) -> Indices:
        """Each one's."""
        while not np.array_equal(higher := self.parent[self.parent], self.parent):
            self.parent = higher
        return self.parent

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
    one, other = looks.thumbnail(left), looks.thumbnail(right)
    difference = np.abs(one.astype(np.int16) - other)
    found: Flags = (aspect <= COPY_ASPECT) & (difference.max(1) <= COPY_MAX) & (difference.mean(1) <= COPY_MEAN)
    short = np.minimum.reduce([looks.width[left], looks.height[left], looks.width[right], looks.height[right]])
    large = ~found & (aspect <= REPRODUCTION_ASPECT) & (short >= REPRODUCTION_PX)
    for k in np.flatnonzero(large & (_correlation(one, other) >= REPRODUCTION_CORRELATION)):
        found[k] = min(tones(one[k]), tones(other[k])) >= REPRODUCTION_TONES
    return found


def _correlation(one: Thumbnails, other: Thumbnails) -> npt.NDArray[np.float64]:
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


@contextmanager
def looks(dataset: Dataset, images: tuple[str, ...] | list[str]) -> Iterator[Looks]:
    """How every picture in some images tables looks; an id in two tables is the first one's. Pictures are not fetched.

    What is read goes into temporary files, table by table: thumbnails, 150 MB of 200,000 works, stay there.
    """

    names = [*COLUMNS, "thumbnail", "status"]

    def one(path: str) -> pa.Table:
        table = dataset.store.get_columns(path, names)
        if missing := {*names} - {*table.column_names}:
            raise ValueError(f"{dataset.store.url(path)} lacks {sorted(missing)}: an earlier release wrote it; collect again")
        return table.filter(pc.field("status") == OK)

    pieces: list[pa.Array] = []
    with tempfile.TemporaryFile(prefix="momalisa-") as facts, tempfile.TemporaryFile(prefix="momalisa-") as file:
        for table in side_by_side(one, sorted(images)):
            _check(table)
            pieces += table["id"].chunks
            facts.write(facts_of(table).tobytes())
            file.write(b"".join(table["thumbnail"].to_pylist()))
        facts.seek(0)
        file.flush()
        ids = pa.chunked_array(pieces, pa.string())
        shape = (len(ids), THUMBNAIL_BYTES)
        thumbnails = np.memmap(file, np.uint8, "r", shape=shape) if len(ids) else np.empty(shape, np.uint8)
        yield Looks.of(ids, np.fromfile(facts, FACTS), thumbnails)


def _first_of_ids(ids: pa.ChunkedArray) -> pa.Array:
    """The rows whose id no row before them has."""
    places = pa.table({"id": ids, "place": pa.array(np.arange(len(ids)))})
    return places.group_by("id").aggregate([("place", "min")])["place_min"].combine_chunks().sort()


def _check(table: pa.Table) -> None:
    """Raises ValueError for a row without a look."""
    right = [pc.equal(pc.binary_length(table[name]), size) for name, size in (("phash", 16), ("thumbnail", THUMBNAIL_BYTES))]
    wrong = table["id"].filter(pc.invert(pc.and_(*right)))
    if len(wrong):
        raise ValueError(f"{wrong[0]} has no perceptual hash and thumbnail: an earlier release collected it; collect again")


def renewed(dataset: Dataset, version: Version, before: Version, policy: Literal["drop", "keep"]) -> Version:
    """A version with its duplicates found anew if its images are not those of the version `before`."""
    if policy == "keep" or not version.images:
        return replace(version, duplicates=())
    if version.images == before.images and before.duplicates:
        return version
    with looks(dataset, version.images) as seen:
        return replace(version, duplicates=(dataset.store.put_table("duplicates", find(seen)),))
