import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from momalisa.collect.block import collect_block
from momalisa.collect.sources import open_source
from momalisa.collect.sources.moma import RIGHTS
from momalisa.collect.sources.text import plain
from momalisa.config import Collect, Source
from momalisa.miniature.wing import serve_in_thread
from momalisa.records import REJECTED, Artwork, Reason

HEADER = "Title,Artist,ObjectID,ImageURL,OnView,Date"
DATA = Path(__file__).parents[4] / "shared" / "data"


def moma(location: object, **source: object) -> Collect:
    chosen = Source.model_validate({"kind": "moma", "location": str(location), **source})
    return Collect(source=chosen, timeout_s=5, attempts=1, requests_per_second=1000)


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
            rights=RIGHTS,
            image_url="https://museum.example/7.jpg",
        )
    ]


def test_works_not_on_view_are_counted_and_left_out(tmp_path: Path) -> None:
    path = collection(tmp_path, "a,x,1,u,,", 'b,x,2,u,"""Floor 1""",', 'c,x,3,u,"""""",', "d,x,4,u, ,")
    source = open_source(moma(path))
    assert [work.id for work in source.works()] == ["moma-2"]
    assert source.left_out["not on view"] == 3
    assert len(works(moma(path, on_view_only=False))) == 4


def test_the_works_that_a_run_asks_for_are_counted_before_the_first(tmp_path: Path) -> None:
    path = collection(
        tmp_path, *(f'{number},x,{number},u,"{"Floor" if number % 2 else ""}",' for number in range(9)), "a,x,1,u,Floor,"
    )
    source = open_source(moma(path), wanted=lambda id: id != "moma-3")
    assert next(source.works()).id == "moma-1"
    assert (source.expected, source.left_out["not on view"]) == (3, 1)
    assert [work.id for work in source.works()] == [f"moma-{number}" for number in (1, 3, 5, 7)]
    limited = open_source(moma(path, limit=2), wanted=lambda id: True)
    assert (len(list(limited.works())), limited.expected) == (2, 2)


def test_a_work_without_a_picture_is_a_rejected_row(tmp_path: Path) -> None:
    rejected, without_id = works(moma(collection(tmp_path, "a,x,1,,F,", "b,x,,u,F,")))
    assert (rejected.id, rejected.status, rejected.error) == ("moma-1", REJECTED, "no picture")
    assert rejected.reason == without_id.reason == Reason.NO_PICTURE
    assert (without_id.status, without_id.error) == (REJECTED, "no ObjectID")


def test_an_id_counts_once_and_the_limit_holds(tmp_path: Path) -> None:
    path = collection(tmp_path, "a,x,1,u,F,", "b,x,1,v,F,", "c,x,2,u,F,", "d,x,3,u,F,")
    assert [work.title for work in works(moma(path))] == ["a", "c", "d"]
    assert [work.title for work in works(moma(path, limit=2))] == ["a", "c"]


CHOICE = "Title,Artist,ObjectID,ImageURL,OnView,Department,Classification"
CHOSEN = ["a,x,1,u,F,Drawings & Prints,Print", "b,x,2,u,F,Painting,Painting", "c,x,3,u,F,Painting,Work on Paper"]


def test_departments_and_classifications_are_chosen_by_name(tmp_path: Path) -> None:
    path = collection(tmp_path, *CHOSEN, header=CHOICE)
    assert [work.id for work in works(moma(path, departments=["drawings & prints", "Film"]))] == ["moma-1"]
    source = open_source(moma(path, departments=["Painting"], classifications=["Painting"]))
    assert [work.id for work in source.works()] == ["moma-2"]
    assert source.left_out == {"another department": 1, "another classification": 1}


def test_a_choice_by_a_column_that_the_file_lacks_is_an_error(tmp_path: Path) -> None:
    assert len(works(moma(collection(tmp_path, "a,x,1,u,F,")))) == 1
    with pytest.raises(ValueError, match=r"lacks the columns Department \(found: Title, Artist"):
        works(moma(collection(tmp_path, "a,x,1,u,F,"), departments=["Painting"]))


def test_unknown_columns_are_passed_by_and_short_rows_filled(tmp_path: Path) -> None:
    path = collection(tmp_path, "9,a,x,1,u,F", "9,b,x,2,u,F,1932,more,cells", header=f"Weight (kg),{HEADER}")
    assert [(work.title, work.date) for work in works(moma(path))] == [("a", ""), ("b", "1932")]


MEASURE = """
import resource, sys
from momalisa.collect.sources import open_source
from momalisa.config import Collect, Source
from momalisa.storage import Store
chosen = Source(location=sys.argv[1], on_view_only=sys.argv[2] == "on view")
source = open_source(Collect(source=chosen), Store(sys.argv[3]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in source.works())
print(count, source.left_out["not on view"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def measured(location: str, which: str, beside: Path) -> tuple[int, int, int]:
    """(works, works not on view, growth of the peak memory in MiB) of reading a collection file in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, location, which, str(beside)], capture_output=True, text=True, check=True
    )
    count, left_out, growth = map(int, done.stdout.split())
    return count, left_out, growth


@pytest.mark.slow
@pytest.mark.parametrize("over_http", [False, True])
def test_a_collection_file_of_200_mb_streams_by(tmp_path: Path, over_http: bool) -> None:
    path, row, count = tmp_path / "collection.csv", "x" * 480, 0
    with open(path, "w") as file:
        file.write(f"{HEADER},Notes\n")
        while file.tell() < 200_000_000:
            file.writelines(
                f"t,a,{number},u,{'F' if number % 100 == 0 else ''},,{row}\n" for number in range(count, count + 1000)
            )
            count += 1000
    app = web.Application()
    app.router.add_static("/", tmp_path)
    with serve_in_thread(app) as base:
        location = f"{base}/collection.csv" if over_http else str(path)
        shown, hidden, growth = measured(location, "on view", tmp_path / "store")
        assert (shown, hidden) == (count // 100, count - count // 100)
        assert growth < 20
        everything, _, growth = measured(location, "all", tmp_path / "store")  # over HTTP: the copy
        assert everything == count
        assert growth < 80  # the ids of 400,000 works, and nothing else


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


def test_what_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*cannot be read.*collect.source.location"):
        works(moma(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"louvre://x cannot be read.*louvre"):
        works(moma("louvre://x"))


def test_the_collection_file_comes_over_http_from_a_private_address_if_the_settings_name_it() -> None:
    with serve_in_thread() as base:
        listed = works(moma(f"{base}/collection.csv"))
        assert len(listed) == 124
        with pytest.raises(ValueError, match=r"HTTP 404.*give a path to a copy"):
            works(moma(f"{base}/catalogue.csv"))
        rows = collect_block(listed[:20], moma(base)).rows  # the addresses *in* the file are not trusted
    assert {row.status for row in rows} == {REJECTED}
    assert {row.reason for row in rows} <= {Reason.REFUSED, Reason.NO_PICTURE}
    assert any("private address" in row.error for row in rows)


def test_inline_tags_go_and_other_angle_brackets_stay() -> None:
    assert plain("<em>Les <i class='x'>Fleurs</i></em>\n  du 5 < 6 > mal<br/>") == "Les Fleurs du 5 < 6 > mal"


def test_moma_s_own_file() -> None:
    path = DATA / "moma_artworks_sample.csv"
    if not path.exists():
        pytest.skip(f"{path} is missing: it is not part of the project")
    source = open_source(moma(path))
    listed = list(source.works())
    assert sum(work.status != REJECTED for work in listed) == 80
    assert source.left_out["not on view"] == 534
    assert any(work.title == "The Starry Night" and work.id == "moma-79802" for work in listed)
    assert not any("<em>" in work.title or "\n" in work.title for work in listed)
