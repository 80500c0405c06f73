"""Two checkpoints side by side, and votes that promotion can read."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from momalisa import votes
from momalisa.config import Serve, Settings
from momalisa.storage import Store
from momalisa.votes import Vote
from serve import keys, png
from serve.api import create_app
from serve.loaded_checkpoint import LoadedCheckpoint
from serve.meters import Meters
from serve.replica import Generator
from serve.scheduler import Scheduler
from serve.task import Ballot, Completed, Event, GenerationTask, Picture, State, Unavailable
from tests.serve.conftest import LIMITS
from tests.serve.double import black, loaded, nan
from tests.serve.test_api import FakeBackend
from tests.serve.test_watch import publish

PATH = "/v1/comparisons"


class Pair(FakeBackend):
    """Two checkpoints, `old-1` and `new-2`."""

    def __init__(self) -> None:
        super().__init__()
        self.ballots: list[Ballot] = []
        self.stored = True

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        assert (task.compare, task.seeds[0], task.adapter) == (True, task.seeds[1], None)
        for index, name in enumerate(("old-1", "new-2")):
            yield Picture(index, name.encode(), name)
        yield Completed("old-1")

    async def state(self) -> State:
        return State("old-1", challenger="new-2")

    async def vote(self, ballot: Ballot) -> None:
        await asyncio.sleep(0.01)
        if not self.stored:
            raise Unavailable("the vote could not be kept; try again")
        self.ballots.append(ballot)


def client_of(backend: Any, limits: Serve = LIMITS, address: str = "10.0.0.1") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(backend, limits), client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://museum")


@pytest.fixture
def root(settings: Settings, tmp_path: Path) -> Store:
    return Store(str(shutil.copytree(settings.root, tmp_path / "root")))


async def test_a_vote_from_two_pictures_to_what_promotion_reads(settings: Settings, root: Store, tmp_path: Path) -> None:
    publish(root, tmp_path, 128)
    serve = settings.serve.model_copy(update={"challenger": "tiny@128"})
    generator = Generator(settings.model_copy(update={"root": root.root, "serve": serve}))
    try:
        async with client_of(generator, serve) as client:
            assert (await client.get("/healthz")).json()["challenger"] == "tiny-128"
            shown = (await client.post(PATH, json={"prompt": "a secret wish", "seed": 5, "n": 3, "stream": True})).json()
            assert (shown["seed"], len(shown["data"]), "tiny" in json.dumps({**shown, "data": []})) == (5, 2, False)
            files = [png.read(base64.b64decode(entry["b64_json"])) for entry in shown["data"]]
            assert [(file["seed"], "checkpoint" in file) for file in files] == [("5", False)] * 2
            answer = await client.post(f"{PATH}/{shown['id']}/vote", json={"better": "second"})
            assert answer.status_code == 200
            again = await client.post(f"{PATH}/{shown['id']}/vote", json={"better": "first"})
            assert again.status_code == 404
    finally:
        await asyncio.to_thread(generator.close)
    winner, loser = answer.json()["better"], answer.json()["other"]
    assert {winner, loser} == {"tiny-64", "tiny-128"}
    assert votes.read(root) == [Vote(winner, loser)]
    [path] = root.list("votes")
    kept = root.read_bytes(path).decode()
    assert json.loads(kept)["seed"] == 5
    assert "secret" not in kept


async def test_a_challenger_that_is_not_there_stops_nobody(settings: Settings) -> None:
    serve = settings.serve.model_copy(update={"challenger": "tiny@65"})
    generator = Generator(settings.model_copy(update={"serve": serve}))
    try:
        async with client_of(generator, serve) as client:
            assert "serve.challenger=tiny@65 cannot be served" in (await client.get("/healthz")).json()["problem"]
            assert (await client.post("/v1/images/generations", json={"prompt": "x"})).status_code == 200
            answer = await client.post(PATH, json={"prompt": "x"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_challenger")
    finally:
        await asyncio.to_thread(generator.close)


async def test_which_comes_first_is_chance_and_the_vote_follows_what_was_shown() -> None:
    backend = Pair()
    first = set()
    async with client_of(backend, LIMITS.model_copy(update={"votes_per_minute": 6_000})) as client:
        for _ in range(40):
            shown = (await client.post(PATH, json={"prompt": "x"})).json()
            ballot = (await client.post(f"{PATH}/{shown['id']}/vote", json={"better": "first"})).json()
            assert base64.b64decode(shown["data"][0]["b64_json"]).decode() == ballot["better"]
            first.add(ballot["better"])
    assert first == {"old-1", "new-2"}
    assert len(backend.ballots) == 40


async def test_one_vote_each_in_time_and_only_ones_own() -> None:
    backend = Pair()
    async with client_of(backend) as client:
        path = f"{PATH}/{(await client.post(PATH, json={'prompt': 'x'})).json()['id']}/vote"
        assert (await client.post(path, json={"better": "third"})).status_code == 400
        answers = await asyncio.gather(*(client.post(path, json={"better": "first"}) for _ in range(2)))
        assert sorted(answer.status_code for answer in answers) == [200, 404]
    assert len(backend.ballots) == 1
    app = create_app(backend, LIMITS)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, client=("10.0.0.1", 1)), base_url="http://museum") as client:
        path = f"{PATH}/{(await client.post(PATH, json={'prompt': 'x'})).json()['id']}/vote"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, client=("10.0.0.2", 1)), base_url="http://museum") as other:
        assert (await other.post(path, json={"better": "first"})).status_code == 404
    assert len(backend.ballots) == 1


async def test_votes_have_a_rate_and_one_that_is_not_kept_can_be_cast_again() -> None:
    backend = Pair()
    backend.stored = False
    async with client_of(backend, LIMITS.model_copy(update={"votes_per_minute": 12})) as client:
        paths = [f"{PATH}/{(await client.post(PATH, json={'prompt': 'x'})).json()['id']}/vote" for _ in range(3)]
        assert (await client.post(paths[0], json={"better": "first"})).status_code == 503
        backend.stored = True
        assert (await client.post(paths[0], json={"better": "first"})).status_code == 200
        late = await client.post(paths[1], json={"better": "first"})
    assert (late.status_code, late.headers["Retry-After"]) == (429, "5")
    assert len(backend.ballots) == 1


async def test_only_so_many_comparisons_are_open() -> None:
    async with client_of(Pair(), LIMITS.model_copy(update={"max_jobs": 2})) as client:
        paths = [f"{PATH}/{(await client.post(PATH, json={'prompt': 'x'})).json()['id']}/vote" for _ in range(3)]
        assert [(await client.post(path, json={"better": "first"})).status_code for path in paths[:2]] == [404, 200]


async def test_votes_need_their_scope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    secrets = []
    for scopes in ("generate,edit,kiosk", "vote", "generate"):
        assert keys.main(["add", str(path), "--name", "x", "--scopes", scopes]) == 0
        secrets.append({"Authorization": f"Bearer {capsys.readouterr().out.split()[1]}"})
    async with client_of(Pair(), LIMITS.model_copy(update={"keys": str(path)})) as client:
        assert (await client.post(PATH, json={"prompt": "x"}, headers=secrets[0])).status_code == 403
        shown = (await client.post(PATH, json={"prompt": "x"}, headers=secrets[1])).json()
        vote = f"{PATH}/{shown['id']}/vote"
        assert (await client.post(vote, json={"better": "first"}, headers=secrets[0])).status_code == 403
        assert (await client.post(vote, json={"better": "first"}, headers=secrets[1])).status_code == 200
        assert (await client.post("/v1/images/generations", json={"prompt": "x"}, headers=secrets[1])).status_code == 403
        assert (await client.post("/v1/images/edits", headers=secrets[2])).status_code == 403
        assert (await client.get("/metrics", headers=secrets[2])).status_code == 403


COMPARED = GenerationTask("x", (7, 7), 3, 1.0, 16, compare=True)


async def drawn_by(challenger: LoadedCheckpoint | None, new: LoadedCheckpoint | None = None) -> list[str]:
    """Whose the two pictures of a comparison are."""
    limits = Serve(max_rows=4, canary_share=0.5, canary_s=60)
    scheduler = Scheduler(loaded(), limits, Meters(), challenger)
    try:
        if new is not None:
            scheduler.roll_out(new)
        events = [event async for event in scheduler.generate(COMPARED)]
        assert isinstance(events[-1], Completed)
        pictures = sorted((event for event in events if isinstance(event, Picture)), key=lambda picture: picture.index)
        return [picture.checkpoint for picture in pictures]
    finally:
        await asyncio.to_thread(scheduler.close)


async def test_the_second_picture_is_the_challengers_or_the_canarys() -> None:
    assert await drawn_by(loaded("rival-3")) == ["old-1", "rival-3"]
    assert await drawn_by(None, loaded("new-2")) == ["old-1", "new-2"]
    assert await drawn_by(loaded("rival-3"), loaded("new-2")) == ["old-1", "rival-3"]
    assert await drawn_by(loaded("old-1"), loaded("new-2")) == ["old-1", "new-2"]
    assert await drawn_by(None) == ["old-1", "old-1"]


@pytest.mark.parametrize("spoil", [nan, black])
async def test_a_challenger_that_draws_nothing_is_seen_by_nobody(spoil: Any) -> None:
    assert await drawn_by(loaded("rival-3", spoil)) == ["old-1", "old-1"]


async def test_two_checkpoints_are_compared_without_an_adapter() -> None:
    for name in ("adapter", "model"):
        async with client_of(Pair()) as client:
            assert (await client.post(PATH, json={"prompt": "x", name: "waves/1"})).status_code == 200
