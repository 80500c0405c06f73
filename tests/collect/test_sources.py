import json
from pathlib import Path

import pytest
from PIL import Image

from momalisa.collect.block import collect_block
from momalisa.collect.sources import MOMA_RIGHTS, open_source, plain
from momalisa.config import Collect, Source
from momalisa.miniature.wing import serve_in_thread
from momalisa.records import OK, REJECTED, Artwork

HEADER = "Title,Artist,ObjectID,ImageURL,OnView,Date"
DATA = Path(__file__).parents[3] / "shared" / "data"


def moma(location: object, **source: object) -> Collect:
    return Collect(source=Source(kind="moma", location=str(location), **source), timeout_s=5, attempts=1)


def folder(location: object, **source: object) -> Collect:
    return Collect(source=Source(kind="folder", location=str(location), **source))


def works(settings: Collect) -> list[Artwork]:
    return list(open_source(settings).works())


def collection(tmp_path: Path, *rows: str, header: str = HEADER) -> Path:
    path = tmp_path / "collection.csv"
    path.write_bytes("\r\n".join([header, *rows, ""]).encode("utf-8-sig"))
    return path


def test_a_row_of_a_collection_file_becomes_a_work(tmp_path: Path) -> None:
    path = collection(
        tmp_path, '"A <em>fine</em>\nday <3","Ann, Bea",7,https://museum.example/7.jpg,"""Floor 5, 501""",1932', ",,,,,"
    )
    assert works(moma(path)) == [
        Artwork(
            id="moma-7",
            status="",
            title="A fine day <3",
            artist="Ann, Bea",
            date="1932",
            rights=MOMA_RIGHTS,
            image_url="https://museum.example/7.jpg",
        )
    ]


def test_works_not_on_view_are_counted_and_left_out(tmp_path: Path) -> None:
    path = collection(tmp_path, "a,x,1,u,,", 'b,x,2,u,"""Floor 1""",', 'c,x,3,u,"""""",', "d,x,4,u, ,")
    source = open_source(moma(path))
    assert [work.id for work in source.works()] == ["moma-2"]
    assert source.not_on_view == 3
    assert len(works(moma(path, on_view_only=False))) == 4


def test_a_work_without_a_picture_is_a_rejected_row(tmp_path: Path) -> None:
    rejected, without_id = works(moma(collection(tmp_path, "a,x,1,,F,", "b,x,,u,F,")))
    assert (rejected.id, rejected.status, rejected.error) == ("moma-1", REJECTED, "no picture")
    assert (without_id.status, without_id.error) == (REJECTED, "no ObjectID")


def test_an_id_counts_once_and_the_limit_holds(tmp_path: Path) -> None:
    path = collection(tmp_path, "a,x,1,u,F,", "b,x,1,v,F,", "c,x,2,u,F,", "d,x,3,u,F,")
    assert [work.title for work in works(moma(path))] == ["a", "c", "d"]
    assert [work.title for work in works(moma(path, limit=2))] == ["a", "c"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"<!DOCTYPE html>\n<html>Just a moment", "lacks the columns ObjectID, Title"),
        (b"Title,Artist,ObjectID,OnView\na,b,1,F\n", "lacks the columns ImageURL .found: Title, Artist"),
        (b"\xff\xfe\x00T\x00i", "not a UTF-8 CSV file"),
        (HEADER.encode() + b"\na,b,1,\xe9,F,\n", "not a UTF-8 CSV file"),
        (HEADER.encode() + b"\n" + b"x" * 200_000 + b",b,1,u,F,\n", "field larger than field limit"),
    ],
)
def test_a_file_that_is_no_collection_is_an_error_that_names_it(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        works(moma(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("make", [moma, folder])
def test_what_is_not_there_is_an_error_that_names_it(tmp_path: Path, make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=r"nowhere.*cannot be read.*collect.source.location"):
        works(make(tmp_path / "nowhere"))


def test_the_collection_file_comes_over_http_from_a_private_address_if_the_settings_name_it() -> None:
    with serve_in_thread() as base:
        listed = works(moma(f"{base}/collection.csv"))
        assert len(listed) == 124
        with pytest.raises(ValueError, match=r"HTTP 404.*give a path to a copy"):
            works(moma(f"{base}/catalogue.csv"))
        rows, _ = collect_block(listed[:20], moma(base), per_host=2)  # the addresses *in* the file are not trusted
    assert {row.status for row in rows} == {REJECTED}
    assert any("private address" in row.error for row in rows)


def test_inline_tags_go_and_other_angle_brackets_stay() -> None:
    assert plain("<em>Les <i class='x'>Fleurs</i></em>\n  du 5 < 6 > mal<br/>") == "Les Fleurs du 5 < 6 > mal"


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
    (good, empty, big), blocked = collect_block(works(settings), settings, per_host=1)
    assert (good.status, good.width, good.height) == (OK, 20, 10)
    assert good.bytes
    assert (empty.status, empty.error, empty.bytes) == (REJECTED, "the file is empty", b"")
    assert big.error == "more bytes than max_bytes=300"
    assert blocked == set()


def test_moma_s_own_file() -> None:
    path = DATA / "moma_artworks_sample.csv"
    if not path.exists():
        pytest.skip(f"{path} is missing: it is not part of the project")
    source = open_source(moma(path))
    listed = list(source.works())
    assert sum(work.status != REJECTED for work in listed) == 80
    assert source.not_on_view == 534
    assert any(work.title == "The Starry Night" and work.id == "moma-79802" for work in listed)
    assert not any("<em>" in work.title or "\n" in work.title for work in listed)
