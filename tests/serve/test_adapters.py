"""Adapters over HTTP: drawn, named in the picture's file, and looked up where nobody else has to wait."""

from __future__ import annotations

import asyncio
import base64
import logging
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from momalisa import checkpoint
from momalisa.config import Settings
from momalisa.engine import Catalogue, NoAdapter
from momalisa.storage import StorageError, Store
from serve import lookup
from serve.api import create_app
from serve.png import read
from serve.replica import Generator
from tests.engine.test_adapters import publish
from tests.serve.conftest import LIMITS
from tests.serve.test_scheduler import until

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def house(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    """A generator of its own, and a LoRA beside what it serves."""
    root = shutil.copytree(settings.root, tmp_path_factory.mktemp("house") / "root")
    store = Store(str(root))
    publish(store, checkpoint.read_best(store).diffusion, "waves/1", 0, tmp_path_factory.mktemp("lora"))
    made = Generator(settings.model_copy(update={"root": str(root)}))
    yield made
    made.close()


@pytest.fixture
async def visitor(house: Generator) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(house, LIMITS)), base_url="http://museum") as made:
        yield made


class Gate(Store):
    """A store that does not answer before it is opened, and then has nothing, or what is wrong with it."""

    def __init__(self, root: str, error: Exception | None = None, opened: bool = False) -> None:
        super().__init__(root)
        self.error, self.asked, self.open = error, list[str](), threading.Event()
        if opened:
            self.open.set()

    def read_bytes(self, path: str) -> bytes:
        self.asked.append(path)
        self.open.wait(20)
        raise self.error or FileNotFoundError(self.url(path))


@pytest.fixture
def gates(house: Generator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Gate]]:
    """Stores that were put before the lookup's; opened in the end, so that no thread is left behind."""
    made: list[Gate] = []
    yield made
    for gate in made:
        gate.open.set()


def behind(house: Generator, gates: list[Gate], monkeypatch: pytest.MonkeyPatch, gate: Gate) -> Gate:
    gates.append(gate)
    monkeypatch.setattr(house._lookup.catalogue, "store", gate)
    return gate


async def test_an_adapter_draws_another_picture_and_its_file_says_so(visitor: httpx.AsyncClient) -> None:
    asked = {"prompt": "a boat", "seed": 7, "steps": 3}
    files = []
    for adapter in (None, "waves/1", "waves/1"):
        answer = await visitor.post(PATH, json={**asked, "adapter": adapter})
        assert answer.status_code == 200, answer.text
        files.append(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert [read(file).get("adapter") for file in files] == [None, "waves/1", "waves/1"]
    assert files[1] == files[2] != files[0]


async def test_a_store_that_does_not_answer_holds_up_nobody_else(
    visitor: httpx.AsyncClient, house: Generator, gates: list[Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await visitor.post(PATH, json={"prompt": "x", "adapter": "waves/1"})).status_code == 200  # it is known from now on
    gate = behind(house, gates, monkeypatch, Gate("slow"))
    asked = asyncio.create_task(visitor.post(PATH, json={"prompt": "x", "adapter": "slow/1"}))
    await until(lambda: gate.asked)
    for adapter in (None, "waves/1"):
        assert (await visitor.post(PATH, json={"prompt": "x", "steps": 3, "adapter": adapter})).status_code == 200
    assert (await visitor.get("/healthz")).status_code == 200
    assert not asked.done()
    gate.open.set()
    answer = await asked
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "there is no adapter slow/1")


@pytest.mark.parametrize("error", [StorageError("gs://secret could not be reached"), PermissionError("gs://secret")])
async def test_a_store_that_fails_is_a_503_and_its_address_is_for_the_log(
    visitor: httpx.AsyncClient,
    house: Generator,
    gates: list[Gate],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    gate = behind(house, gates, monkeypatch, Gate("s", error, opened=True))
    for _ in range(2):
        answer = await visitor.post(PATH, json={"prompt": "x", "adapter": "failing/1"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert "secret" not in answer.text
    assert "gs://secret" in caplog.text
    assert len(gate.asked) == 2  # it may be there: asked again at once


async def test_nobody_waits_long_for_a_store(
    visitor: httpx.AsyncClient, house: Generator, gates: list[Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "WITHIN_S", 0.1)
    gate = behind(house, gates, monkeypatch, Gate("slow"))
    names = [f"late/{number}" for number in range(2 * lookup.THREADS)]
    answers = await asyncio.gather(*(visitor.post(PATH, json={"prompt": "x", "adapter": name}) for name in names))
    assert [answer.status_code for answer in answers] == [503] * len(names)
    assert len(gate.asked) <= lookup.THREADS


async def test_what_is_not_there_is_remembered_and_its_place_not_told(
    visitor: httpx.AsyncClient,
    house: Generator,
    gates: list[Gate],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = behind(house, gates, monkeypatch, Gate("secret", opened=True))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            answer = await visitor.post(PATH, json={"prompt": "x", "adapter": "nobody/1"})
            assert (answer.status_code, answer.json()["error"]["message"]) == (400, "there is no adapter nobody/1")
    assert len(gate.asked) == 1
    assert gate.url("checkpoints/nobody/1") in caplog.text


def test_a_name_that_was_none_is_looked_for_again_in_time(house: Generator) -> None:
    now, store = 0.0, house._store
    catalogue = Catalogue(store, lambda: now)
    for name in ("new/1", "tiny/64", "no name"):
        with pytest.raises(NoAdapter):
            catalogue.find(name)
    manifest = store.read_json("checkpoints/waves/1/manifest.json")
    store.write_json("checkpoints/new/1/manifest.json", {**manifest, "path": "checkpoints/new/1", "run": "new"})
    now = 29.0
    with pytest.raises(NoAdapter, match="holds no complete checkpoint"):
        catalogue.find("new/1")
    now = 31.0
    assert catalogue.find("new/1").run == catalogue.known("new/1").run == "new"


def test_misses_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momalisa.engine.catalogue.MAX_MISSES", 3)
    catalogue = Catalogue(Gate(str(tmp_path), opened=True))
    for number in range(10):
        with pytest.raises(NoAdapter):
            catalogue.find(f"nobody/{number}")
    assert list(catalogue._misses) == ["nobody/7", "nobody/8", "nobody/9"]
