"""A curator's file: every row is taken or none, and nobody's edit is lost to a captioner or an old export."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momalisa.dataset import Dataset
from momalisa.dataset.edits import Row, edited, export_csv, import_csv, with_edits
from tests.dataset.conftest import BLIP, add, caption, work


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "captions.csv"


def rows(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))


def test_the_export_has_every_work_once_and_says_what_is_edited(collection: Dataset) -> None:
    version = with_edits(collection, collection.latest(), {"w1": "A MOMA artwork of: a boat"})
    data = export_csv(collection, version, BLIP)
    assert data.startswith(b"\xef\xbb\xbfid,title,caption,edited\n")
    assert [tuple(row.values()) for row in rows(data)] == [
        ("w0", "Work 0", "A MOMA artwork of: w0", "no"),
        ("w1", "Work 1", "A MOMA artwork of: a boat", "yes"),
        ("w2", "Work 2", "A MOMA artwork of: w2", "no"),
        ("w3", "Work 3", "A MOMA artwork of: w3", "no"),
        ("w4", "Work 4", "", "no"),
    ]


def test_an_export_that_comes_back_as_it_was_changes_nothing(collection: Dataset, file: Path) -> None:
    collection.publish(with_edits(collection, collection.latest(), {"w1": "mine"}))
    before = collection.latest()
    file.write_bytes(export_csv(collection, before, BLIP))
    assert import_csv(collection, file) == (0, 0)
    assert collection.latest() == before
    assert len(collection.log()) == 4


def test_edits_come_in_and_are_withdrawn(collection: Dataset, file: Path) -> None:
    file.write_text('id,title,caption,edited\nw0,,"a boat, at  night",no\nw4,,by hand,\nw2,,A MOMA artwork of: w2,yes\n')
    assert import_csv(collection, file) == (3, 0)
    assert collection.edits(collection.latest()) == {"w0": "a boat, at night", "w2": "A MOMA artwork of: w2", "w4": "by hand"}
    file.write_text("id,caption,edited\nw0,a boat by day,yes\nw4,,withdraw\n")
    assert import_csv(collection, file) == (1, 1)
    assert collection.edits(collection.latest()) == {"w0": "a boat by day", "w2": "A MOMA artwork of: w2"}
    file.write_text("id,caption,edited\nw0,,withdraw\nw2,,withdraw\n")
    import_csv(collection, file)
    assert collection.latest().edits == ()


def test_an_old_export_pins_no_captioner_and_undoes_nobody(collection: Dataset, file: Path) -> None:
    file.write_bytes(export_csv(collection, collection.latest(), BLIP))
    add(collection, [], [caption("w0", "anew"), caption("w1", "anew")], captioner="blip-2")
    collection.update(lambda latest: with_edits(collection, latest, {"w1": "another curator's"}))
    assert import_csv(collection, file) == (0, 0)
    assert collection.texts(collection.latest(), "blip-2") == {"w0": "anew", "w1": "another curator's"}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_spreadsheet_may_write_semicolons_and_its_line_ends(collection: Dataset, file: Path, newline: str) -> None:
    file.write_bytes(newline.join(["id;title;caption;edited", "w0;Work, 0;ein Boot – nachts;no", ";;;", ""]).encode("utf-8-sig"))
    import_csv(collection, file)
    assert collection.edits(collection.latest()) == {"w0": "ein Boot – nachts"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"id,caption\nw0,ok\nw0,again\n", "line 3: 'w0' stands on line 2 too; remove one of them"),
        (b"id,caption\nw0,ok\nw99,x\n", "line 3: 'w99' is no work with a picture in the latest version; remove the row"),
        (b"id,caption\nbad0,x\n", "line 2: 'bad0' is no work with a picture"),
        (b"id,caption\nw1,ok\nw0,  \n", "line 3: 'w0' has an empty caption; write one, or remove the row"),
        (b"id,caption,edited\nw0,x,maybe\n", "line 2: 'w0': edited is 'maybe'; it can be yes, no or withdraw"),
        (b"id,caption\nw0,caf\xe9\n", "line 2: not UTF-8; save it as `CSV UTF-8"),
        (b'id,caption\nw1,ok\nw0,"never\nclosed', "line 3: not CSV"),
        (
            b"id,caption\nw0,a boat, at night\n",
            "line 2: 3 cells where the first line has 2; put texts that hold commas in double",
        ),
        (b"name,text\nw0,x\n", "line 1: expected columns id, title, caption, edited, found 'name,text'"),
        (b"", "line 1: expected columns"),
        (b"\x89PNG\r\n\x1a\n\x00", "not UTF-8"),
        (b'id,caption\nw1,"two\nlines"\nw99,x\n', "line 4: 'w99'"),
    ],
)
def test_a_file_that_is_wrong_anywhere_changes_nothing(collection: Dataset, file: Path, data: bytes, said: str) -> None:
    before = collection.store.files("")
    file.write_bytes(data)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        import_csv(collection, file)
    assert said in str(raised.value)
    assert str(file) in str(raised.value)
    assert collection.store.files("") == before


def test_many_problems_are_counted(collection: Dataset, file: Path) -> None:
    file.write_text("id,caption\n" + "".join(f"x{n},a\n" for n in range(8)))
    with pytest.raises(ValueError, match=r"nothing was imported\. line 2: .*'x4'.*; and 3 more"):
        import_csv(collection, file)


def test_a_file_that_is_not_there_is_named(collection: Dataset, file: Path) -> None:
    with pytest.raises(ValueError, match=r"captions\.csv: No such file"):
        import_csv(collection, file)


def test_titles_that_a_spreadsheet_would_run_are_text(dataset: Dataset) -> None:
    version = add(dataset, [work(0, title='=HYPERLINK("http://x")')], [caption("w0")])
    assert rows(export_csv(dataset, version, BLIP))[0]["title"] == '\'=HYPERLINK("http://x")'


ids, texts = st.sampled_from("abcd"), st.sampled_from(["x", "y", "machine", ""])


@given(
    old=st.dictionaries(ids, st.sampled_from(["x", "y"])),
    given_rows=st.lists(
        st.builds(Row, st.just(2), ids, texts, st.sampled_from(["yes", "no", "", "withdraw"])), unique_by=lambda r: r.id
    ),
)
def test_taking_a_file_twice_is_taking_it_once(old: dict[str, str], given_rows: list[Row]) -> None:
    machine = {id: {"machine"} for id in "abcd"}
    once = edited(old, given_rows, machine)
    assert edited(once, given_rows, machine) == once
    assert "" not in once.values()
    assert {id: text for id, text in once.items() if id not in {row.id for row in given_rows}} == {
        id: text for id, text in old.items() if id not in {row.id for row in given_rows}
    }
