"""Folders and buckets of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gcsfs
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from momalisa.collect.block import collect_block
from momalisa.collect.sources import open_source
from momalisa.collect.sources.listing import listed
from momalisa.config import Collect, Source
from momalisa.dataset import Dataset
from momalisa.miniature.wing import serve_in_thread
from momalisa.records import IMAGES, OK, REJECTED, Artwork, Reason
from momalisa.storage import Store


def folder(location: object, **source: object) -> Collect:
    return Collect(source=Source.model_validate({"kind": "folder", "location": str(location), **source}))


def works(settings: Collect) -> list[Artwork]:
    return list(open_source(settings).works())


def pictures(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), "red").save(root / name)
    return root


def test_a_folder_s_pictures_are_works_with_stable_ids(tmp_path: Path) -> None:
    first = works(folder(pictures(tmp_path / "a", "b.png", "deep/a.JPG", ".hidden.png", ".git/x.png")))
    second = works(folder(pictures(tmp_path / "b", "b.png", "deep/a.JPG")))
    assert [work.id for work in first] == [work.id for work in second]
    assert [Path(work.image_url).name for work in first] == ["b.png", "a.JPG"]
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    assert len(works(folder(tmp_path / "a"))) == 2
    assert len(works(folder(tmp_path / "a", limit=1))) == 1


def test_the_pictures_that_a_run_asks_for_are_expected(tmp_path: Path) -> None:
    settings, last = folder(pictures(tmp_path, "a.png", "b.png", "c.png")), works(folder(tmp_path))[-1].id
    source = open_source(settings, wanted=lambda id: id != last)
    assert source.expected is None
    assert len(list(source.works())) == 3
    assert source.expected == 2
    limited = open_source(folder(tmp_path, limit=1), wanted=lambda id: True)
    assert (len(list(limited.works())), limited.expected) == (1, 1)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_beside_the_pictures_is_used(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path, "a.png", "deep/b.png", "c.png")
    told = [
        {"file_name": "a.png", "title": "One", "artist": "Ann", "year": 1901, "licence": "CC0"},
        {"file_name": "./deep/b.png", "title": "Two\nlines", "rights": "mine"},
        {"file_name": "gone.png", "title": "Three"},
    ]
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in told) + "\n")
    else:
        rows = ["file_name,title,artist,year,licence,rights", "a.png,One,Ann,1901,CC0,", './deep/b.png,"Two\nlines",,,,mine']
        text = "\n".join([*rows, "gone.png,Three", ""])
        (tmp_path / "metadata.csv").write_text(text)
    a, c, b, gone = works(folder(tmp_path))
    assert (a.title, a.artist, a.date, a.rights) == ("One", "Ann", "1901", "CC0")
    assert (b.title, b.rights, c.title) == ("Two lines", "mine", "")
    assert (gone.title, gone.status, gone.error) == ("Three", REJECTED, "no picture")


def test_metadata_of_a_file_that_is_there_and_no_picture_is_no_work(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "metadata.csv").write_text("file_name,title\nnotes.txt,Notes\na.png,One\n")
    assert [work.title for work in works(folder(tmp_path))] == ["One"]


def test_odd_metadata_and_empty_folders_are_errors_that_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no picture"):
        works(folder(tmp_path))
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"title": "b"}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl line 2: expected .*file_name"):
        works(folder(tmp_path))


def test_a_block_of_a_folder_is_read_and_cleaned(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes(bytes(400))
    settings = folder(tmp_path).model_copy(update={"max_bytes": 300})
    listed = works(settings)
    good, empty, big, gone = collect_block([*listed, Artwork("d", "", image_url=str(tmp_path / "d.png"))], settings).rows
    assert (good.status, good.width, good.height) == (OK, 20, 10)
    assert good.bytes
    assert (empty.status, empty.error, empty.bytes) == (REJECTED, "the file is empty", b"")
    assert big.error == "more bytes than max_bytes=300"
    reasons = [Reason.OK, Reason.NOT_A_PICTURE, Reason.TOO_LARGE, Reason.NOT_FOUND]
    assert [row.reason for row in (good, empty, big, gone)] == reasons


def test_names_and_metadata_that_are_no_utf_8_are_rows(tmp_path: Path) -> None:
    pictures(tmp_path / "art", "a.png", "caf\udce9.png")  # as a latin-1 file system wrote it
    (tmp_path / "art" / "metadata.jsonl").write_text('{"file_name": "a.png", "title": "half \\ud83d a smile"}\n')
    settings = folder(tmp_path / "art")
    good, bad = collect_block(works(settings), settings).rows
    assert (good.status, good.title) == (OK, "half \\ud83d a smile")
    assert (bad.status, bad.reason) == (REJECTED, Reason.REFUSED)
    assert bad.error == f"its address is not UTF-8: {tmp_path}/art/caf\\udce9.png; rename it"
    dataset = Dataset(str(tmp_path / "dataset"))
    table = dataset.put_rows("images", [good.row(), bad.row()], IMAGES)
    assert {row["id"] for row in dataset.rows([table])} == {good.id, bad.id}


@given(st.lists(st.text(st.characters(codec=None), max_size=20), min_size=11, max_size=11))
def test_whatever_a_source_tells_can_be_stored(texts: list[str]) -> None:
    names = ("title", "artist", "date", "medium", "classification", "department", "credit", "rights", "url")
    row = listed(texts[0], texts[1], **dict(zip(names, texts[2:], strict=True))).row()
    assert all(text.encode() or True for text in row.values() if isinstance(text, str))


def test_what_is_no_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    for location in (tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(ValueError, match=f"{location} cannot be read: no such file or folder.*collect.source.location"):
            works(folder(location))


def test_departments_are_chosen_by_the_metadata(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,department\na.png,Prints\n")
    assert [Path(work.image_url).name for work in works(folder(tmp_path, departments=["prints"]))] == ["a.png"]


class Bucket:
    """Google's storage as it answers to those who may not read, and as it lists names."""

    status, message = 401, "Anonymous caller does not have storage.objects.list access to the Google Cloud Storage bucket."

    def __init__(self) -> None:
        self.app = web.Application()
        self.app.router.add_get("/{path:.*}", self.answer)
        self.names: list[str] = []  # of objects, for those who may read; two a page
        self.asked: list[dict[str, str]] = []

    async def answer(self, request: web.Request) -> web.Response:
        if not self.names:
            return web.json_response({"error": {"code": self.status, "message": self.message}}, status=self.status)
        self.asked.append(dict(request.query))
        begin = int(request.query.get("pageToken", 0))
        names = [name for name in self.names if name.startswith(request.query["prefix"])]
        more = {"nextPageToken": str(begin + 2)} if begin + 2 < len(names) else {}
        return web.json_response({"items": [{"name": name} for name in names[begin : begin + 2]], **more})


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    denying = Bucket()
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs.GCSFileSystem.clear_instance_cache()
    with serve_in_thread(denying.app) as base:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", base)
        yield denying
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_of_a_bucket_s_objects_nothing_but_names_is_asked_for_page_by_page(bucket: Bucket) -> None:
    bucket.names = ["art/.hidden/a.png", "art/a.png", "art/deep/b c.JPG", "art/notes.txt", "art/z.png", "arts/d.png"]
    assert [work.image_url for work in works(folder("gs://moma/art/"))] == [
        f"gs://moma/art/{name}" for name in ("a.png", "deep/b c.JPG", "z.png")
    ]
    assert [query.get("pageToken") for query in bucket.asked] == [None, "2", "4"]
    assert {query["fields"] for query in bucket.asked} == {"items(name),nextPageToken"}
    assert [work.image_url for work in works(folder("gs://moma"))][-1] == "gs://moma/arts/d.png"
    with pytest.raises(ValueError, match="gs://moma/else holds no picture"):
        works(folder("gs://moma/else"))


def test_missing_credentials_say_which_variable_and_which_role(bucket: Bucket) -> None:
    with pytest.raises(ValueError, match=r"gs://moma/art cannot be read.*Anonymous caller") as caught:
        works(folder("gs://moma/art"))
    assert "set GOOGLE_APPLICATION_CREDENTIALS to the path of a service account's key" in str(caught.value)
    assert "roles/storage.objectViewer on gs://moma" in str(caught.value)


def test_an_account_without_the_role_is_told_which_one(bucket: Bucket) -> None:
    bucket.status, bucket.message = 403, "robot@project.iam does not have storage.objects.list access to the bucket."
    with pytest.raises(
        ValueError, match=r"gs://moma cannot be read.*robot@project.*grant.*roles/storage.objectViewer on gs://moma"
    ):
        works(folder("gs://moma"))


def test_a_bucket_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setattr(Store, "patience_s", 0.5)

    async def at_once(_: float) -> None: ...

    with monkeypatch.context() as patched:
        patched.setattr("gcsfs.retry.asyncio", type("Clock", (), {"sleep": staticmethod(at_once)}))
        with pytest.raises(ValueError, match=r"gs://moma/art cannot be read.*127.0.0.1:1.*check the bucket's name"):
            works(folder("gs://moma/art"))
