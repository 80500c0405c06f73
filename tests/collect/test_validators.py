from __future__ import annotations

from pathlib import Path

from momalisa.collect import validators
from momalisa.collect.fetched import Validators
from momalisa.storage import Store

TABLE, A, B = "images/0a.parquet", Validators('"a"'), Validators("", "Sun, 06 Nov 1994 08:49:37 GMT")


def test_what_is_added_stands_beside_what_is_known(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert validators.read(store, TABLE) == {}
    validators.add(store, TABLE, {"a": A, "b": Validators('"old"')})
    validators.add(store, TABLE, {"b": B, "c": Validators()})
    assert validators.read(store, TABLE) == {"a": A, "b": B, "c": Validators()}
    assert store.list("") == ["state/validators/0a.json"]


def test_where_nothing_was_said_nothing_is_written(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    validators.add(store, TABLE, {})
    assert store.list("") == []


def test_what_is_said_back() -> None:
    assert A.headers == {"If-None-Match": '"a"'}
    assert B.headers == {"If-Modified-Since": B.last_modified}
    assert Validators().headers == {}
