"""A collection file that has not changed is not fetched again."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from momalisa.collect.fetched import Validators
from momalisa.collect.sources import open_source
from momalisa.collect.sources.copies import FOLDER, Copy
from momalisa.config import Collect, Source
from momalisa.miniature.wing import serve_in_thread
from momalisa.storage import Store

HEADER = "Title,Artist,ObjectID,ImageURL,OnView"


class Host:
    """A collection file with validators, and how many bytes of it were sent."""

    def __init__(self) -> None:
        self.titles, self.etag, self.sent = ["One", "Two"], '"1"', 0
        self.app = web.Application()
        self.app.router.add_get("/collection.csv", self.answer)

    async def answer(self, request: web.Request) -> web.Response:
        headers = {"ETag": self.etag} if self.etag else {}
        if self.etag and request.headers.get("If-None-Match") == self.etag:
            return web.Response(status=304, headers=headers)
        rows = [f"{title},x,{number},u,F" for number, title in enumerate(self.titles)]
        body = "\n".join([HEADER, *rows, ""]).encode()
        self.sent += len(body)
        return web.Response(body=body, headers=headers)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture
def base(host: Host) -> Iterator[str]:
    with serve_in_thread(host.app) as address:
        yield f"{address}/collection.csv"


def titles(base: str, store: Store) -> list[str]:
    settings = Collect(source=Source(location=base), attempts=1, requests_per_second=1000)
    return [work.title for work in open_source(settings, store).works()]


def test_an_unchanged_file_costs_no_bytes(host: Host, base: str, store: Store) -> None:
    assert titles(base, store) == ["One", "Two"]
    sent = host.sent
    assert titles(base, store) == ["One", "Two"]
    assert host.sent == sent > 0


def test_a_changed_file_takes_the_place_of_its_copy(host: Host, base: str, store: Store) -> None:
    titles(base, store)
    host.titles, host.etag = ["Three"], '"2"'
    assert titles(base, store) == titles(base, store) == ["Three"]
    assert len([path for path in store.list(FOLDER) if path.endswith(".csv")]) == 1


def test_a_host_without_validators_is_asked_for_all_of_it(host: Host, base: str, store: Store) -> None:
    host.etag = ""
    titles(base, store)
    sent = host.sent
    assert titles(base, store) == ["One", "Two"]
    assert host.sent == 2 * sent
    assert store.list(FOLDER) == []


def test_a_copy_that_is_gone_is_fetched_again(host: Host, base: str, store: Store) -> None:
    titles(base, store)
    for path in store.list(FOLDER):
        if path.endswith(".csv"):
            store.delete(path)
    assert titles(base, store) == ["One", "Two"]


def test_a_copy_comes_out_of_a_bucket_as_it_went_in(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momalisa.storage.PIECE", 1000)
    store, data = Store(f"{bucket}/copies"), bytes(range(256)) * 20
    Copy(store, "http://museum/collection.csv").keep(io.BytesIO(data), Validators("e"))
    again, out = Copy(store, "http://museum/collection.csv"), io.BytesIO()
    again.read(out)
    assert (again.said, out.getvalue()) == (Validators("e"), data)
    assert Copy(store, "http://museum/another.csv").said == Validators()


def test_a_copy_that_does_not_fit_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
import io, resource, signal, sys
from momalisa.collect.fetched import Validators
from momalisa.collect.sources.copies import Copy
from momalisa.storage import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
Copy(Store(sys.argv[1]), "http://museum/collection.csv").keep(io.BytesIO(bytes(5000)), Validators("e"))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "5,000 bytes to write" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
