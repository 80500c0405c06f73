"""The card says what the version holds, and says it alone."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from momalisa.dataset import Dataset, Version
from momalisa.dataset.card import ASPECTS, bars, counted, edges, page, sample, write
from momalisa.dataset.edits import with_edits
from momalisa.storage import Store
from tests.dataset.conftest import BLIP, add, caption, work


def test_the_card_shows_the_version_in_one_file(collection: Dataset, tmp_path: Path) -> None:
    version = with_edits(collection, collection.latest(), {"w1": "a curator's <words>"})
    write(collection, version, "The wing", BLIP, Store(str(tmp_path / "card")))
    text = (tmp_path / "card" / "index.html").read_text()
    sheet = (tmp_path / "card" / "contact.png").read_bytes()
    with Image.open(io.BytesIO(sheet)) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100
        assert len(picture.getcolors(maxcolors=100_000) or []) > 5
    assert base64.b64encode(sheet).decode() in text
    assert not re.findall(r"(?:src|href)=\"?(?!data:)\w", text)
    assert "<script" not in text
    for said in (
        "The wing: the collection",
        version.sha256[:12],
        "<b>6</b><span>works",
        "<b>2</b><span>could not be used",
        "<b>1</b><span>the same picture again",
        "<td>not_a_picture<td>the file is empty<td class=n>2",
        "<td>w5<td>w0<td>exact",
        "a curator&#x27;s &lt;words&gt;<td>curator",
        "<td>CC0<td class=n>6",
        "captions/blip-1",
    ):
        assert said in text, said
    parser = Whole()
    parser.feed(text)
    parser.close()


class Whole(HTMLParser):
    """Fails on a table or figure that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in {"table", "figure", "svg", "div"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in {"table", "figure", "svg", "div"}:
            assert self.open.pop() == tag

    def close(self) -> None:
        assert not self.open


def test_titles_are_text_and_not_markup(dataset: Dataset) -> None:
    version = add(dataset, [work(0, title="<script>alert(1)</script>", rights="<b>mine", credit='"><img>')], [caption("w0")])
    text = page(dataset, version, "<i>x", BLIP, b"")
    assert "<script" not in text
    assert "<b>mine" not in text
    assert "<i>x" not in text
    assert '"><img>' not in text


def test_an_empty_collection_and_one_without_captions_have_cards(dataset: Dataset, tmp_path: Path) -> None:
    write(dataset, Version(), "empty", None, Store(str(tmp_path / "card")))
    assert "<b>0</b><span>works" in (tmp_path / "card" / "index.html").read_text()
    version = add(dataset, [work(0)])
    assert "no captioner" in page(dataset, version, "x", None, b"")


def test_the_same_version_has_the_same_card(collection: Dataset, tmp_path: Path) -> None:
    cards = []
    for name in "ab":
        write(collection, collection.latest(), "x", BLIP, Store(str(tmp_path / name)))
        cards.append(Store(str(tmp_path / name)).read_bytes("index.html"))
    assert cards[0] == cards[1]


@given(values=st.lists(st.integers(1, 5000), max_size=40))
def test_every_value_is_in_one_bar(values: list[int]) -> None:
    borders = edges(values)
    assert sum(count for _, count in counted(values, borders)) == len(values)
    assert 2 <= len(borders) <= 13
    assert list(borders) == sorted(set(borders))


@given(values=st.lists(st.floats(0.01, 100), max_size=40))
def test_every_shape_is_in_one_bar(values: list[float]) -> None:
    bins = counted(values, ASPECTS)
    assert sum(count for _, count in bins) == len(values)
    assert len({label for label, _ in bins}) == len(bins)


@pytest.mark.parametrize(("low", "high", "label"), [(3, 4, "3"), (3, 6, "3–5"), (0, 0.5, "< 0.5"), (2, float("inf"), "≥ 2")])
def test_bars_say_their_range(low: float, high: float, label: str) -> None:
    assert counted([], [low, high]) == [(label, 0)]


def test_bars_are_as_high_as_their_counts() -> None:
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" fill', bars([("a", 1), ("b", 4), ("c", 0)]))]
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.01)
    assert heights[2] == 0
    assert bars([("a", 0)]) == "<p>None.</p>"


def test_a_sample_keeps_most_of_itself_as_a_collection_grows() -> None:
    small = [{"id": f"w{n}"} for n in range(50)]
    first = {row["id"] for row in sample(small, 20)}
    second = {row["id"] for row in sample([*small, *({"id": f"x{n}"} for n in range(5))], 20)}
    assert len(first & second) >= 15
    assert [row["id"] for row in sample(small, 20)] == sorted(first)


def test_a_row_without_rights_says_so(dataset: Dataset) -> None:
    version = add(dataset, [replace(work(0), rights=" ")], [caption("w0")])
    assert "nothing is said" in page(dataset, version, "x", BLIP, b"")
