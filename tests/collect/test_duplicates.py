"""Copies are found, other works are not, and it does not matter in which order they come."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from momalisa.collect import duplicates
from momalisa.collect.hygiene import clean
from momalisa.collect.phash import THUMBNAIL_BYTES, look
from momalisa.config import Collect
from momalisa.dataset import Dataset, Version
from momalisa.miniature import draw, wing
from momalisa.records import IMAGES, REJECTED, Artwork

SHARED = Path(os.environ.get("MOMALISA_SHARED", Path(__file__).parents[3] / "shared"))
ARTWORKS = SHARED / "data" / "artworks"
real_works = pytest.mark.skipif(not ARTWORKS.is_dir(), reason=f"no pictures in {ARTWORKS}; $MOMALISA_SHARED names the folder")
GREAT_WAVE = {"alt-wave", "katsushika-hokusai-the-great-wave-off-kanagawa"}


def row(id: str, picture: Image.Image, sha256: str = "") -> dict[str, Any]:
    """What hygiene would make of a picture, without its encoding."""
    seen = look(picture)
    size = {"width": picture.width, "height": picture.height}
    return {"id": id, "sha256": sha256 or hashlib.sha256(id.encode()).hexdigest(), **size, **seen._asdict()}


def collected(dataset: Dataset, paths: list[str], policy: Any) -> Version:
    """The latest version with more tables, as the collect job makes it."""
    latest = dataset.latest()
    return duplicates.renewed(dataset, latest.with_images(paths), latest, policy)


def find(rows: list[dict[str, Any]]) -> pa.Table:
    thumbnails = np.frombuffer(b"".join(row["thumbnail"] for row in rows), np.uint8).reshape(-1, THUMBNAIL_BYTES)
    schema = pa.schema([IMAGES.field(name) for name in duplicates.COLUMNS])
    table = pa.Table.from_pylist(rows, schema=schema)
    return duplicates.find(duplicates.Looks.of(table["id"], duplicates.facts_of(table), thumbnails))


def found(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Duplicate -> the work that is kept."""
    table = find(rows)
    return dict(zip(table["id"].to_pylist(), table["duplicate_of"].to_pylist(), strict=True))


def jpeg(picture: Image.Image, side_px: int, quality: int) -> Image.Image:
    """The picture scaled to a long side and compressed."""
    scale, sink = side_px / max(picture.size), io.BytesIO()
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture.resize(size, Image.Resampling.BICUBIC).save(sink, "JPEG", quality=quality)
    return Image.open(sink).convert("RGB")


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@lru_cache(maxsize=1)
def works() -> dict[str, Image.Image]:
    """The real works as hygiene leaves them."""
    files = sorted(ARTWORKS.glob("*.jpg"))
    return {path.stem: opened(clean(path.read_bytes(), Collect()).bytes) for path in files}


@real_works
def test_of_real_works_only_the_great_wave_is_there_twice() -> None:
    assert len(works()) == 114
    again = found([row(name, picture) for name, picture in works().items()])
    assert [{*pair} for pair in again.items()] == [GREAT_WAVE]


@real_works
def test_copies_of_real_works_are_found() -> None:
    changes = [(512, 85), (320, 60), (200, 75), (128, 50)]
    rows = [row(name, picture) for name, picture in works().items() if name not in GREAT_WAVE]
    for number, (name, picture) in enumerate(works().items()):
        if name not in GREAT_WAVE:
            side_px, quality = changes[number % len(changes)]
            rows.append(row(f"{name} again", jpeg(picture, side_px, quality)))
    again = found(rows)
    assert all(id.removesuffix(" again") == kept.removesuffix(" again") for id, kept in again.items())
    assert len(again) >= 0.99 * 112


def test_no_work_of_the_wing_is_another_one() -> None:
    rows = [row(record["ObjectID"], opened(clean(media, Collect()).bytes)) for record, media in _exhibits()]
    assert len(rows) == wing.GOOD
    assert found(rows) == {}


def _exhibits() -> list[tuple[dict[str, str], bytes]]:
    shown = [(exhibit.record, wing.media(exhibit.record["ImageURL"].rsplit("/", 1)[-1])) for exhibit in wing.exhibits()]
    return [(record, media) for record, media in shown if media is not None]


@pytest.mark.parametrize("large", [False, True])
def test_drawings_with_different_captions_are_different_works(large: bool) -> None:
    rows = []
    for number, scene in enumerate(draw.all_scenes()):
        picture = draw.draw(scene, seed=number % 3)
        rows.append(row(scene.caption, picture.resize((512, 512), Image.Resampling.BICUBIC) if large else picture))
    assert found(rows) == {}


def test_works_in_one_style_with_different_captions_are_different_works() -> None:
    rng = random.Random("a wall")
    close = [scene for scene in draw.all_scenes() if scene.subject in ("flag", "boat", "grid", "stripes")]
    rows = [row(scene.caption, wing.hung(scene, 10_000 + number)) for number, scene in enumerate(rng.sample(close, 150))]
    assert found(rows) == {}


@pytest.mark.parametrize("colour", ["red", "#101010", "#f8f8f8"])
def test_a_monochrome_is_its_copy_and_not_another_shade(colour: str) -> None:
    picture = Image.new("RGB", (300, 200), colour)
    shade = Image.new("RGB", (300, 200), tuple(value ^ 8 for value in picture.getpixel((0, 0))))
    assert found([row("a", picture), row("b", jpeg(picture, 150, 80)), row("c", shade)]) == {"b": "a"}


def scene(number: int = 0, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """A picture full of detail, the same on every machine."""
    noise = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def test_the_largest_is_kept_and_of_equals_the_smallest_id() -> None:
    small, large = scene(size=(200, 150)), scene(size=(400, 300))
    assert found([row("a", small), row("z", large), row("y", large), row("c", small)]) == {"a": "y", "c": "y", "z": "y"}


def test_the_same_file_is_exact_and_a_copy_is_near() -> None:
    rows = [row("a", scene(), "same"), row("b", scene(), "same"), row("c", jpeg(scene(), 200, 70)), row("d", scene(1))]
    table = find(rows).to_pylist()
    assert [(item["id"], item["duplicate_of"], item["kind"]) for item in table] == [("b", "a", "exact"), ("c", "a", "near")]
    assert table[0]["distance"] == 0
    assert table[0]["correlation"] == 1
    assert 0.99 < table[1]["correlation"] < 1
    assert table[1]["distance"] <= duplicates.RADIUS


def test_the_same_file_is_exact_whatever_it_looks_like() -> None:
    assert found([row("a", scene(0), "same"), row("b", scene(1), "same")]) == {"b": "a"}
    assert found([row("a", scene(0)) | {"sha256": ""}, row("b", scene(1)) | {"sha256": ""}]) == {}


def test_another_photograph_of_a_painting_is_found_but_not_of_a_small_picture() -> None:
    def photographed(picture: Image.Image) -> Image.Image:
        width, height = picture.size
        cropped = picture.crop((0, height // 50, width, height - height // 50))
        return cropped.point([min(255, round(12 + 0.85 * value)) for value in range(256)] * 3)

    assert found([row("a", scene(size=(800, 600))), row("b", photographed(scene(size=(800, 600))))]) == {"b": "a"}
    assert found([row("a", scene(size=(200, 150))), row("b", photographed(scene(size=(200, 150))))]) == {}


def test_a_squeezed_picture_is_another_one() -> None:
    assert found([row("a", scene()), row("b", scene().resize((400, 150)))]) == {}


def test_colours_make_a_work_of_their_own() -> None:
    """Two grounds of equal grey."""
    red, green = (Image.new("RGB", (300, 300), colour) for colour in ((200, 0, 0), (0, 102, 0)))
    for picture in (red, green):
        picture.paste((255, 255, 255), (60, 60, 200, 140))
    assert look(red).phash == look(green).phash
    assert found([row("a", red), row("b", green)]) == {}


def test_a_small_seal_in_another_colour_makes_another_work() -> None:
    red, green = scene(size=(200, 200)), scene(size=(200, 200))
    red.paste((200, 0, 0), (100, 100, 125, 125))
    green.paste((0, 102, 0), (100, 100, 125, 125))
    assert found([row("a", red), row("b", green)]) == {}


@given(st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_the_order_of_rows_does_not_matter(rng: random.Random) -> None:
    rows = [row(f"{number}", jpeg(scene(number % 3), 100 + 20 * number, 80)) for number in range(8)]
    expected = find(rows)
    rng.shuffle(rows)
    assert find(rows).equals(expected)
    assert expected.num_rows == 5


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.lists(st.lists(st.integers(0, 63), max_size=12), max_size=40))
@settings(max_examples=100, deadline=None)
def test_every_pair_within_the_radius_is_nominated_once(hashes: list[int], flips: list[list[int]]) -> None:
    for base, bits in zip(list(hashes), flips, strict=False):
        hashes.append(base ^ sum(1 << bit for bit in set(bits)))
    unique = np.unique(np.array(hashes, np.uint64))
    pairs = [pair for left, right in duplicates.near_hashes(unique) for pair in zip(left.tolist(), right.tolist(), strict=True)]
    expected = {
        (i, j)
        for i in range(len(unique))
        for j in range(i + 1, len(unique))
        if (int(unique[i]) ^ int(unique[j])).bit_count() <= duplicates.RADIUS
    }
    assert len(pairs) == len(expected)
    assert {(min(pair), max(pair)) for pair in pairs} == expected


def test_flipped_bits_may_lie_as_far_apart_as_they_can() -> None:
    flipped = sum(1 << bit for bit in range(0, 64, 8))
    pairs = list(duplicates.near_hashes(np.array([0, flipped], np.uint64)))
    assert [pair.tolist() for pair in pairs[0]] == [[0], [1]]
    assert not list(duplicates.near_hashes(np.array([0, flipped | 2], np.uint64)))


def plainly(rows: list[dict[str, Any]]) -> dict[str, str]:
    """`found`, one pair after another."""
    first = {row["id"]: row for row in reversed(rows)}
    works = sorted(first.values(), key=lambda row: (-row["width"] * row["height"], row["id"]))
    roots = list(range(len(works)))

    def join(one: int, other: int) -> None:
        low, high = sorted((roots[one], roots[other]))
        roots[:] = [low if root == high else root for root in roots]

    def same(one: int, other: int) -> bool:
        pair = duplicates.Looks(*columns, np.arange(len(works)), thumbnails)
        return bool(duplicates.confirmed(pair, np.array([one]), np.array([other]))[0])

    def distance(one: int, other: int) -> int:
        return (int(works[one]["phash"], 16) ^ int(works[other]["phash"], 16)).bit_count()

    thumbnails = np.frombuffer(b"".join(row["thumbnail"] for row in works), np.uint8).reshape(-1, THUMBNAIL_BYTES)
    columns = [np.array([row[name] for row in works], kind) for name, kind in zip(duplicates.COLUMNS, "USUdd", strict=True)]
    alone: list[int] = []
    for index, work in enumerate(works):
        exact = [other for other in alone if work["sha256"] and works[other]["sha256"] == work["sha256"]]
        alone += [] if exact else [index]
        join(index, exact[0] if exact else index)
    leaders: list[int] = []
    for index in alone:
        alike = [other for other in leaders if not distance(other, index) and same(other, index)]
        leaders += [] if alike else [index]
        join(index, alike[0] if alike else index)
    for one, other in itertools.combinations(leaders, 2):
        if 0 < distance(one, other) <= duplicates.RADIUS and same(one, other):
            join(one, other)
    return {work["id"]: works[root]["id"] for work, root in zip(works, roots, strict=True) if work is not works[root]}


@lru_cache(maxsize=16)
def variant(number: int, size: int) -> tuple[tuple[str, Any], ...]:
    return tuple(row("", jpeg(scene(number), size, 80)).items())


drawn = st.tuples(
    st.integers(0, 15), st.sampled_from(["", "s", "t"]) | st.uuids().map(str), st.sampled_from([0, 1, 6, 0x1FF]),
    st.integers(0, 2), st.sampled_from([120, 200, 330]),
)  # fmt: skip


@given(st.lists(st.lists(drawn, max_size=12), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_what_is_found_is_what_plain_comparison_finds(blocks: list[list[tuple[int, str, int, int, int]]]) -> None:
    dataset, paths = Dataset(f"memory://{uuid4().hex}"), []
    for block in blocks:
        works = []
        for number, sha256, flips, *kind in block:
            facts = dict(variant(*kind))
            phash = f"{int(facts['phash'], 16) ^ flips:016x}"
            works.append(Artwork(**facts | {"id": f"w{number:02}", "sha256": sha256, "phash": phash}).row())
        paths.append(dataset.put_rows("images", works, IMAGES))
    table = collected(dataset, paths, "drop").duplicates
    again = {row["id"]: row["duplicate_of"] for row in dataset.rows(table)}
    assert again == plainly(list(dataset.rows(set(paths))))


MEMORY = """
import tracemalloc
import numpy as np, pyarrow as pa
from momalisa.collect import duplicates
from momalisa.dataset import Dataset

def peak(works, rows=250):
    dataset, random, paths = Dataset(f"memory://{works}"), np.random.default_rng(works), []
    for start in range(0, works, rows):
        texts = {name: [random.bytes(size).hex() for _ in range(rows)] for name, size in (("sha256", 32), ("phash", 8))}
        thumbnails = [random.bytes(768) for _ in range(rows)]
        facts = {"id": [f"folder-{start + row:016x}" for row in range(rows)], "status": ["ok"] * rows, **texts}
        sides = {name: pa.array([32] * rows, pa.int32()) for name in ("width", "height")}
        paths.append(dataset.store.put_table("images", pa.table({**facts, **sides, "thumbnail": thumbnails})))
    tracemalloc.start()
    with duplicates.looks(dataset, paths) as seen:
        assert not len(duplicates.find(seen))
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return traced + pa.default_memory_pool().max_memory()

few, many = peak(10_000), peak(50_000)
print((many - few) / 40_000)
"""


def test_looking_for_duplicates_holds_less_than_500_bytes_a_work() -> None:
    """In a process of its own: what each work more costs, by Arrow's count and Python's."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 500


def test_nothing_and_one_have_no_duplicates() -> None:
    assert find([row("a", scene())]).num_rows == 0
    assert find([]).num_rows == 0


class TestVersions:
    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Dataset:
        return Dataset(str(tmp_path))

    def store(self, dataset: Dataset, *works: tuple[str, Image.Image]) -> str:
        rows = [Artwork(bytes=b"x", **row(id, picture)) for id, picture in works]
        rows.append(Artwork(id=f"bad-{works[0][0]}", status=REJECTED, error="404"))
        return dataset.put_rows("images", [work.row() for work in rows], IMAGES)

    def again(self, dataset: Dataset, version: Version) -> dict[str, str]:
        return {row["id"]: row["duplicate_of"] for row in dataset.rows(version.duplicates)}

    def test_duplicates_across_blocks_are_found_as_the_collection_grows(self, dataset: Dataset) -> None:
        first = collected(dataset, [self.store(dataset, ("a", jpeg(scene(), 200, 80)), ("b", scene(1)))], "drop")
        assert self.again(dataset, first) == {}
        assert len(first.duplicates) == 1
        dataset.publish(first)
        assert collected(dataset, [], "drop") == first
        second = collected(dataset, [self.store(dataset, ("c", scene()))], "drop")
        assert self.again(dataset, second) == {"a": "c"}  # the larger one came later
        assert second.duplicates != first.duplicates

    def test_keep_names_no_duplicates_and_drop_finds_them_again(self, dataset: Dataset) -> None:
        kept = collected(dataset, [self.store(dataset, ("a", scene()), ("b", scene()))], "keep")
        assert kept.duplicates == ()
        dataset.publish(kept)
        dropped = collected(dataset, [], "drop")
        assert self.again(dataset, dropped) == {"b": "a"}
        dataset.publish(dropped)
        assert collected(dataset, [], "keep") == kept

    def test_the_table_does_not_depend_on_the_blocks(self, dataset: Dataset) -> None:
        works = [(f"w{number}", jpeg(scene(number % 2), 200 + number, 80)) for number in range(4)]
        together = collected(dataset, [self.store(dataset, *works)], "drop")
        apart = collected(dataset, [self.store(dataset, work) for work in works], "drop")
        assert together.duplicates == apart.duplicates

    def test_an_older_table_is_an_error_that_names_it(self, dataset: Dataset) -> None:
        old = dataset.store.put_table("images", pa.table({"id": ["a"], "status": ["ok"]}))
        with pytest.raises(ValueError, match=f"{old} lacks .*'phash'"):
            collected(dataset, [old], "drop")

    def test_a_work_without_a_look_is_an_error_that_names_it(self, dataset: Dataset) -> None:
        blind = Artwork(bytes=b"x", **row("w7", scene()) | {"phash": ""})
        path = dataset.put_rows("images", [Artwork(bytes=b"x", **row("w1", scene())).row(), blind.row()], IMAGES)
        with pytest.raises(ValueError, match="w7 has no perceptual hash"):
            collected(dataset, [path], "drop")

    def test_a_dataset_of_rejected_works_has_none(self, dataset: Dataset) -> None:
        path = dataset.put_rows("images", [Artwork(id="a", status=REJECTED, error="404").row()], IMAGES)
        assert self.again(dataset, collected(dataset, [path], "drop")) == {}

    def test_an_empty_dataset_has_none(self, dataset: Dataset) -> None:
        assert collected(dataset, [], "drop") == Version()


def test_a_look_is_the_same_on_every_machine() -> None:
    seen = look(scene())
    assert (seen.phash, hashlib.sha256(seen.thumbnail).hexdigest()[:16]) == ("c0a7ecd64252ecba", "502a2a289e465794")
    assert len(seen.thumbnail) == THUMBNAIL_BYTES
    assert look(Image.new("RGB", (50, 50), "teal")).phash == "8000000000000000"
