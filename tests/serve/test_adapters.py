"""Adapters over HTTP: drawn, named in the picture's file, and looked up where nobody else has to wait."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import logging
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from momalisa import checkpoint
from momalisa.config import Diffusion, Settings
from momalisa.engine import Catalogue, NoAdapter
from momalisa.storage import StorageError, Store
from serve import keys, lookup
from serve.api import create_app
from serve.lookup import Lookup
from serve.png import read
from serve.replica import Generator
from tests.engine.test_adapters import publish
from tests.serve.conftest import LIMITS
from tests.serve.test_api import FakeBackend
from tests.serve.test_scheduler import until

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def house(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    """A generator of its own, and a LoRA beside what it serves."""
    root = shutil.copytree(settings.root, tmp_path_factory.mktemp("house") / "root")
    store = Store(str(root))
    publish(store, checkpoint.read_best(store).diffusion, "waves/1", 0, tmp_path_factory.mktemp("lora"))
    waves = checkpoint.read(store, "checkpoints/waves/1")
    base = Diffusion(model="miniature://diffusion").model_dump()
    other = dataclasses.replace(waves, path="checkpoints/other/5", run="other", images_seen=5, base=base)
    store.write_json("checkpoints/other/5/manifest.json", dataclasses.asdict(other))
    trained = dataclasses.replace(waves, path="checkpoints/night/000000200", run="night", images_seen=200)
    store.write_json(f"{trained.path}/manifest.json", dataclasses.asdict(trained))
    for name in waves.files:
        store.write_bytes(f"{trained.path}/weights/{name}", store.read_bytes(f"{waves.path}/weights/{name}"))
    store.write_json("checkpoints/damaged/6/manifest.json", {"format": "another"})
    store.write_bytes("checkpoints/unfinished/7/weights/x", b"")
    made = Generator(settings.model_copy(update={"root": str(root)}))
    yield made
    made.close()


@pytest.fixture
async def visitor(house: Generator) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(house, LIMITS)), base_url="http://museum") as made:
        yield made


@pytest.fixture
async def client(visitor: httpx.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url="http://museum/v1", api_key="none", max_retries=0, http_client=visitor) as made:
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


async def test_openais_client_finds_adapters_among_the_models_and_asks_for_them_so(client: openai.AsyncOpenAI) -> None:
    models = {model.id: model async for model in client.models.list()}
    assert list(models) == ["tiny-64", "night/200", "waves/1"]  # no whole models, none of another base, and nothing unfinished
    assert (models["waves/1"].owned_by, models["waves/1"].model_extra) == ("momalisa", {"parent": "tiny-64"})
    for id_, model in models.items():
        assert await client.models.retrieve(id_) == model
        asked = {"seed": 7, "steps": 3}
        answer = await client.images.generate(model=id_, prompt="a boat", extra_body=asked)
        named = await client.images.generate(prompt="a boat", extra_body=asked | ({"adapter": id_} if "/" in id_ else {}))
        assert answer.data is not None
        assert named.data is not None
        assert answer.data[0].b64_json == named.data[0].b64_json


async def test_who_asks_for_what_is_not_there_is_told_what_is(client: openai.AsyncOpenAI, visitor: httpx.AsyncClient) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'waves/2'; there are tiny-64, night/200, waves/1") as caught:
        await client.models.retrieve("waves/2")
    assert caught.value.code == "model_not_found"
    for fields in ({"adapter": "waves/2"}, {"model": "waves/2", "stream": True}, {"model": "tiny-64", "adapter": "waves/2"}):
        answer = await visitor.post(PATH, json={"prompt": "x", **fields})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert answer.json()["error"]["message"] == "there is no adapter waves/2; there are night/200, waves/1"
    both = await visitor.post(PATH, json={"prompt": "x", "model": "waves/2", "adapter": "waves/1"})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "adapter")
    assert (await visitor.post(PATH, json={"prompt": "x", "model": "waves/1", "adapter": "waves/1"})).status_code == 200
    zeros = await visitor.post(PATH, json={"prompt": "x", "model": "night/200", "adapter": "night/000000200"})
    assert read(base64.b64decode(zeros.json()["data"][0]["b64_json"]))["adapter"] == "night/200"
    job = (await visitor.post("/v1/jobs", json={"prompt": "x", "model": "waves/2"})).json()
    assert (job["status"], job["error"]["code"]) == ("failed", "model_not_found")


@pytest.mark.parametrize("model", ["gpt-image-1", "tiny-64", "waves/one", "a/waves/1", "waves/1\n", ""])
async def test_a_model_that_is_no_adapters_name_means_nothing(model: str) -> None:
    backend = FakeBackend()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(backend, LIMITS)), base_url="http://museum") as made:
        assert (await made.post(PATH, json={"prompt": "x", "model": model})).status_code == 200
    assert backend.asked[0].adapter is None


async def test_models_are_for_keys_that_may_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, statuses, secrets = tmp_path / "keys.json", {}, {"nobody": "x"}
    for scope in ("generate", "vote"):
        keys.main(["add", str(path), "--name", scope, "--scopes", scope])
        secrets[scope] = capsys.readouterr().out.split()[1]
    app = create_app(FakeBackend(), LIMITS.model_copy(update={"keys": str(path)}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://museum") as made:
        for scope, secret in secrets.items():
            headers = {"Authorization": f"Bearer {secret}"}
            statuses[scope] = [(await made.get(f"/v1/models{id_}", headers=headers)).status_code for id_ in ("", "/fake-1", "/x")]
    assert statuses == {"generate": [200, 200, 404], "vote": [403] * 3, "nobody": [401] * 3}


async def test_a_list_of_adapters_is_read_once_in_a_while(house: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    now, listings, read_ = 0.0, list[str](), list[str]()
    made = Lookup(house._store.root, lambda: now)
    store, base = made.catalogue.store, checkpoint.read(house._store, "checkpoints/waves/1").diffusion

    def noted(folder: str, list_: Any = store.list) -> list[str]:
        listings.append(folder)
        return list(list_(folder))

    monkeypatch.setattr(store, "list", noted)
    monkeypatch.setattr(store, "read_bytes", lambda path, read=store.read_bytes: (read_.append(path), read(path))[1])
    try:
        assert await asyncio.gather(*(made.adapters(base) for _ in range(5))) == [["night/200", "waves/1"]] * 5
        assert len(listings) == 1
        first = len(read_)
        now = lookup.LISTED_S + 1
        assert await made.adapters(base) == ["night/200", "waves/1"]
        assert (len(listings), len(read_)) == (2, first)  # each manifest once
    finally:
        made.close()


async def test_a_store_that_cannot_be_listed_leaves_the_served_checkpoint_and_is_asked_again(
    visitor: httpx.AsyncClient, house: Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Lookup(house._store.root)
    monkeypatch.setattr(house, "_lookup", made)
    with monkeypatch.context() as broken:
        broken.setattr(made.catalogue.store, "list", lambda folder: (_ for _ in ()).throw(StorageError("gs://secret is away")))
        answer = await visitor.get("/v1/models/waves/1")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert "secret" not in answer.text
        served = [model["id"] for model in (await visitor.get("/v1/models")).json()["data"]]
        assert served == ["tiny-64"]
        unknown = await visitor.post(PATH, json={"prompt": "x", "adapter": "nobody/2"})
        assert (unknown.status_code, unknown.json()["error"]["message"]) == (404, "there is no adapter nobody/2")
    assert "gs://secret is away" in caplog.text
    assert (await visitor.get("/v1/models/waves/1")).status_code == 200
    made.close()


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
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_served_checkpoint_is_told_while_the_store_of_adapters_does_not_answer(
    visitor: httpx.AsyncClient, house: Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, opened = Lookup(house._store.root), threading.Event()
    monkeypatch.setattr(house, "_lookup", made)
    monkeypatch.setattr(made.catalogue.store, "list", lambda folder: (opened.wait(20), [])[1])
    try:
        assert (await asyncio.wait_for(visitor.get("/v1/models/tiny-64"), 5)).json()["id"] == "tiny-64"
        monkeypatch.setattr(lookup, "STORE_WITHIN_S", 0.1)
        answer = await visitor.get("/v1/models")
        assert (answer.status_code, [model["id"] for model in answer.json()["data"]]) == (200, ["tiny-64"])
        assert "/v1/models lists the served checkpoint alone" in caplog.text
    finally:
        opened.set()
        made.close()


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
    monkeypatch.setattr(lookup, "STORE_WITHIN_S", 0.1)
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
            assert answer.status_code == 404
            assert answer.json()["error"]["message"].startswith("there is no adapter nobody/1")
    asked = [path for path in gate.asked if "nobody" in path]  # and others that earlier tests gave up
    assert asked == [f"checkpoints/nobody/{images}/manifest.json" for images in ("000000001", "1")]
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
