"""A block's works: what is asked for again, what replaces what, and what nobody may publish twice."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from PIL import Image

from momalisa.collect import validators
from momalisa.collect.block import Stored, origins, store_block
from momalisa.collect.fetched import Validators
from momalisa.collect.hosts import Hosts
from momalisa.collect.pace import Share
from momalisa.config import Collect, Source
from momalisa.dataset import Dataset
from momalisa.dataset.corrections import Corrections
from momalisa.records import OK, REJECTED, Artwork, Reason
from momalisa.storage import Store

SETTINGS = Collect(allow_private_addresses=True, attempts=1, requests_per_second=1000)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Museum:
    """Pictures with ETags, by name; a picture without bytes is a 404. It counts the bytes that it sent."""

    def __init__(self) -> None:
        self.pictures: dict[str, tuple[str, bytes]] = {
            "a": ('"a1"', png("red")),
            "b": ('"b1"', png("blue")),
            "c": ("", png("gold")),
        }
        self.headers: dict[str, str] = {}
        self.sent, self.asked = 0, 0
        self.app = web.Application()
        self.app.router.add_get("/{name}", self.answer)

    async def answer(self, request: web.Request) -> web.Response:
        etag, data = self.pictures.get(request.match_info["name"], ("", b""))
        self.asked += request.match_info["name"] != "robots.txt"
        if not data:
            return web.Response(status=404)
        headers = self.headers | ({"ETag": etag} if etag else {})
        if etag and request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers=headers)
        self.sent += len(data)
        return web.Response(body=data, headers=headers)


@pytest.fixture
def museum() -> Museum:
    return Museum()


@pytest.fixture
def root(tmp_path: Any) -> str:
    return str(tmp_path / "dataset")


def listed(base: str, names: str = "abcd") -> list[Artwork]:
    return [Artwork(name, "", image_url=f"{base}/{name}") for name in names]


def stored(root: str, works: list[Artwork], table: str = "") -> Stored:
    tables = {work.id: table for work in works} if table else {}
    return store_block(root, works, SETTINGS, Share(4), Hosts(), tables)


def corrected_rows(root: str, table: str, block: Stored) -> dict[str, dict[str, Any]]:
    """The works that a block tells otherwise, as they are once they are published."""
    store = Dataset(root).store
    told = store.get_table(block.told)
    made = Corrections([told]).made(store.get_table(table)).to_pylist()
    return {row["id"]: row for row in made if row["id"] in told["id"].to_pylist()}


def states(root: str, path: str) -> dict[str, tuple[str, str]]:
    return {row["id"]: (row["status"], row["reason"]) for row in Dataset(root).rows([path])}


def test_a_block_is_one_table_and_validators_lie_beside_it(root: str, base: str) -> None:
    first = stored(root, listed(base))
    assert states(root, first.path) == {**dict.fromkeys("abc", (OK, "ok")), "d": (REJECTED, "not_found")}
    assert (first.new, first.replaced, first.figures.ok, first.figures.reasons) == (4, frozenset(), 3, {"not_found": 1})
    store = Dataset(root).store
    assert validators.read(store, first.path) == {"a": Validators('"a1"'), "b": Validators('"b1"')}
    assert store.list("state") == [f"state/validators/{first.path.removeprefix('images/').removesuffix('.parquet')}.json"]


def test_etags_do_not_change_a_table(tmp_path: Any, museum: Museum, base: str) -> None:
    first = stored(str(tmp_path / "one"), listed(base))
    museum.pictures["a"] = ('"other"', png("red"))
    assert stored(str(tmp_path / "two"), listed(base)).path == first.path


def test_asked_again_with_nothing_changed_no_byte_is_sent(root: str, museum: Museum, base: str) -> None:
    first, museum.sent = stored(root, listed(base, "ab")), 0
    again = stored(root, listed(base, "ab"), first.path)
    assert (again.path, again.new, museum.sent) == ("", 0, 0)
    assert (again.figures.ok, again.figures.reasons) == (2, {"not_modified": 2})


def test_the_same_bytes_without_validators_are_no_change(root: str, base: str) -> None:
    first = stored(root, listed(base))
    again = stored(root, listed(base, "c"), first.path)
    assert (again.new, again.figures.reasons) == (0, {"not_modified": 1})


def test_a_changed_picture_is_a_row_and_the_others_are_not(root: str, museum: Museum, base: str) -> None:
    first = stored(root, listed(base))
    museum.pictures["a"] = ('"a2"', png("green"))
    again = stored(root, listed(base, "abc"), first.path)
    assert states(root, again.path) == {"a": (OK, "ok")}
    assert again.replaced == {"a"}
    assert validators.read(Dataset(root).store, again.path) == {"a": Validators('"a2"')}


def test_a_new_etag_of_the_same_picture_is_handed_on(root: str, museum: Museum, base: str) -> None:
    first = stored(root, listed(base))
    museum.pictures["a"] = ('"a2"', png("red"))
    again = stored(root, listed(base, "ab"), first.path)
    assert (again.new, again.said_again) == (0, {first.path: {"a": Validators('"a2"')}})


def test_a_corrected_title_is_a_row_with_the_picture_that_is_there(root: str, museum: Museum, base: str) -> None:
    first = stored(root, listed(base))
    before = {row["id"]: row for row in Dataset(root).rows([first.path])}
    museum.sent = 0
    wrong, right = listed(base, "ab"), replace(listed(base, "b")[0], title="Right", rights="CC0")
    again = stored(root, [wrong[0], right], first.path)
    assert (again.new, again.replaced, museum.sent) == (1, {"b"}, 0)
    assert (again.figures.ok, again.figures.reasons) == (2, {"not_modified": 2})
    assert again.kept == frozenset()  # its caption may name the title
    assert corrected_rows(root, first.path, again) == {"b": {**before["b"], "title": "Right", "rights": "CC0"}}
    assert (again.path, museum.sent) == ("", 0)


@pytest.mark.parametrize(("name", "sent"), [("c", True), ("a", False)], ids=["the same bytes", "gone today"])
def test_a_correction_is_taken_whatever_the_host_answers(root: str, museum: Museum, base: str, name: str, sent: bool) -> None:
    first = stored(root, listed(base))
    museum.pictures.pop("a")
    right, museum.sent = replace(listed(base, name)[0], credit="Gift of Ann"), 0
    again = stored(root, [right], first.path)
    row = corrected_rows(root, first.path, again)[name]
    assert (row["status"], row["credit"], bool(row["bytes"]), bool(museum.sent)) == (OK, "Gift of Ann", True, sent)
    assert again.replaced == again.kept == {name}


@pytest.mark.parametrize("there", [b"", b"<html>soon</html>"], ids=["nothing", "a page"])
def test_of_a_picture_that_is_not_at_its_new_address_the_old_address_stays(
    root: str, museum: Museum, base: str, there: bytes
) -> None:
    """Its validators belong there."""
    first = stored(root, listed(base, "a"))
    museum.pictures["moved"] = ('"page"', there)
    moved = replace(listed(base, "a")[0], title="Moved", image_url=f"{base}/moved")
    again = stored(root, [moved], first.path)
    row = corrected_rows(root, first.path, again)["a"]
    assert (row["title"], row["image_url"]) == ("Moved", f"{base}/a")
    assert validators.read(Dataset(root).store, again.told) == {}  # those that are known hold


def corrected(root: str, works: list[Artwork], table: str) -> Stored:
    tables = {work.id: table for work in works}
    return store_block(root, works, SETTINGS, Share(4), Hosts(), tables, frozenset(tables))


def test_what_is_only_told_otherwise_asks_nobody_and_reads_no_picture(
    root: str, museum: Museum, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stored(root, listed(base))
    before, museum.asked = {row["id"]: row for row in Dataset(root).rows([first.path])}, 0
    facts = {"a": {"credit": "Gift of Ann"}, "b": {"title": "Right"}, "d": {"rights": "CC0"}}
    works = [replace(work, **facts.get(work.id, {})) for work in listed(base)]
    with monkeypatch.context() as patched:
        patched.setattr(Store, "get_table", lambda _, path: pytest.fail(f"{path} was read with its pictures"))
        again = corrected(root, works, first.path)
    assert corrected_rows(root, first.path, again) == {id: before[id] | facts[id] for id in facts}
    assert (again.new, again.replaced, again.kept, museum.asked) == (3, {"a", "b", "d"}, {"a", "d"}, 0)
    assert (again.figures.ok, again.figures.bad_before, again.figures.reasons) == (3, 1, {})
    assert (again.path, validators.read(Dataset(root).store, again.told)) == ("", {})
    assert corrected(root, listed(base), first.path).told == ""


def test_the_same_picture_at_another_address_is_asked_for_there_once(root: str, museum: Museum, base: str) -> None:
    first = stored(root, listed(base))
    museum.pictures["e"], museum.sent = ('"e1"', museum.pictures["a"][1]), 0
    moved = [replace(listed(base, "a")[0], image_url=f"{base}/e")]
    again = stored(root, moved, first.path)
    row = corrected_rows(root, first.path, again)["a"]
    assert (row["image_url"], row["status"], bool(row["bytes"])) == (f"{base}/e", OK, True)
    assert (again.kept, again.figures.reasons, bool(museum.sent)) == ({"a"}, {"not_modified": 1}, True)
    assert validators.read(Dataset(root).store, again.told) == {"a": Validators('"e1"')}


def test_a_rejected_work_that_is_not_at_its_new_address_either_is_a_row_with_that_address(root: str, base: str) -> None:
    first = stored(root, listed(base, "d"))
    again = stored(root, [replace(listed(base, "d")[0], image_url=f"{base}/dd")], first.path)
    assert [(row["image_url"], row["reason"]) for row in Dataset(root).rows([again.path])] == [(f"{base}/dd", "not_found")]
    assert (again.replaced, again.figures.bad_before) == ({"d"}, 1)


def test_a_correction_of_a_rejected_work_is_a_row(root: str, base: str) -> None:
    first = stored(root, listed(base, "d"))
    again = stored(root, [replace(listed(base, "d")[0], title="Right")], first.path)
    assert [(row["title"], row["reason"]) for row in Dataset(root).rows([again.path])] == [("Right", "not_found")]


def test_a_picture_that_has_moved_is_asked_for_without_conditions(root: str, museum: Museum, base: str) -> None:
    first = stored(root, listed(base))
    museum.pictures["e"], museum.sent = ('"a1"', png("pink")), 0
    moved = [replace(listed(base, "a")[0], image_url=f"{base}/e")]
    assert stored(root, moved, first.path).replaced == {"a"}
    assert museum.sent


def test_a_good_picture_stays_when_it_cannot_be_had_but_not_when_it_is_disallowed(root: str, museum: Museum, base: str) -> None:
    first = stored(root, listed(base))
    museum.pictures.pop("a")
    gone = stored(root, listed(base, "ab"), first.path)
    assert (gone.new, gone.figures.ok, gone.figures.reasons) == (0, 2, {"not_found": 1, "not_modified": 1})
    museum.headers = {"X-Robots-Tag": "noai"}
    forbidden = stored(root, listed(base, "b"), first.path)
    assert states(root, forbidden.path) == {"b": (REJECTED, "disallowed")}
    assert forbidden.figures.ok == 0


def test_a_rejected_work_is_replaced_only_by_something_else(root: str, museum: Museum, base: str) -> None:
    first = stored(root, listed(base))
    assert stored(root, listed(base, "d"), first.path).new == 0
    museum.pictures["d"] = ("", b"<html>soon</html>")
    second = stored(root, listed(base, "d"), first.path)
    assert states(root, second.path) == {"d": (REJECTED, "not_a_picture")}
    museum.pictures["d"] = ("", png("white"))
    third = stored(root, listed(base, "d"), second.path)
    assert states(root, third.path) == {"d": (OK, "ok")}
    assert (third.replaced, third.figures.ok) == ({"d"}, 1)


def test_what_the_source_rejects_is_a_row_as_it_is_and_asks_nobody(root: str, museum: Museum) -> None:
    work = Artwork("x", REJECTED, "no picture", Reason.NO_PICTURE)
    first = stored(root, [work])
    assert states(root, first.path) == {"x": (REJECTED, "no_picture")}
    assert stored(root, [work], first.path).new == 0
    assert museum.asked == 0


def test_the_hosts_whose_robots_txt_a_block_needs() -> None:
    works = [
        *listed("https://a.example"),
        Artwork("x", REJECTED, image_url="https://b.example/x"),
        Artwork("y", "", image_url="?"),
    ]
    assert origins(works, SETTINGS) == {"https://a.example"}
    assert origins(works, SETTINGS.model_copy(update={"obey_robots": False})) == set()
    assert (
        origins([Artwork("z", "", image_url="gs://b/z.png")], Collect(source=Source(kind="folder", location="gs://b"))) == set()
    )
