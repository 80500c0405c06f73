"""What a host says to one worker, all of a run keep."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp import web

from momalisa.collect import news
from momalisa.collect.downloader import Downloader
from momalisa.collect.fetched import Fetched
from momalisa.collect.news import Heard, NewsBook
from momalisa.collect.pace import Share
from momalisa.config import Collect
from momalisa.records import Reason

SETTINGS = Collect(allow_private_addresses=True, attempts=3, obey_robots=False, requests_per_second=20)


class Museum:
    """Asks the first visitor to come again in a few seconds; or, if it is `suspicious`, the fifth one whether it is human."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.suspicious = False
        self.app = web.Application()
        self.app.router.add_get("/{number}", self.answer)

    async def answer(self, request: web.Request) -> web.Response:
        self.times.append(time.time())
        if self.suspicious and len(self.times) == 5:
            return web.Response(status=403, text="<html><title>Just a moment...</title></html>", content_type="text/html")
        if not self.suspicious and len(self.times) == 1:
            return web.Response(status=429, headers={"Retry-After": "3"})
        return web.Response(body=b"art")


@pytest.fixture
def museum() -> Museum:
    return Museum()


async def fetch(urls: list[str], share: Share, book: NewsBook, settings: Collect = SETTINGS) -> list[Fetched]:
    found: dict[int, Fetched] = {}
    await Downloader(settings, share, news=book).fetch_all(urls, found.__setitem__)
    return [found[index] for index in range(len(urls))]


async def test_a_host_that_asks_one_worker_to_wait_is_left_alone_by_the_others(museum: Museum, base: str) -> None:
    urls, book = [f"{base}/{number}" for number in range(20)], NewsBook()
    ours, theirs = await asyncio.gather(fetch(urls[:10], Share(2, 0, 2), book), fetch(urls[10:], Share(2, 1, 2), book))
    assert [one.data for one in (*ours, *theirs)] == [b"art"] * 20
    asked = museum.times[0]
    assert not [at - asked for at in museum.times if 2 < at - asked < 2.99]
    assert sum(at - asked >= 2.99 for at in museum.times) >= 10


async def test_who_begins_in_a_pause_keeps_it(museum: Museum, base: str) -> None:
    museum.times.append(0.0)
    book, until = NewsBook(), time.time() + 0.5
    await book.pause("127.0.0.1", until)
    await book.pause("127.0.0.1", until - 1)  # of two the longer one counts
    await book.pause("elsewhere.example", until + 60)
    assert [one.data for one in await fetch([f"{base}/1"], Share(), book)] == [b"art"]
    assert museum.times[1] >= until - 0.01


async def test_a_host_that_answers_one_worker_with_a_challenge_is_asked_no_more_by_the_others(museum: Museum, base: str) -> None:
    museum.suspicious = True
    urls, book, began = [f"{base}/{number}" for number in range(40)], NewsBook(), time.monotonic()
    settings = SETTINGS.model_copy(update={"requests_per_second": 2})
    shares = Share(2, 0, 2), Share(2, 1, 2)
    halves = await asyncio.gather(*(fetch(urls[n * 20 :][:20], share, book, settings) for n, share in enumerate(shares)))
    ends = [one.reason for half in halves for one in half]
    assert set(ends) == {Reason.OK, Reason.BLOCKED}
    assert 4 <= ends.count(Reason.OK) <= 10  # before the challenge, or under way by then
    assert len(museum.times) == ends.count(Reason.OK) + 1
    assert time.monotonic() - began < 15  # the others wait for no turn: these would take 18 s


async def test_who_begins_after_a_challenge_asks_nothing(museum: Museum, base: str) -> None:
    book = NewsBook()
    await book.block("127.0.0.1")
    assert [one.reason for one in await fetch([f"{base}/1"], Share(), book)] == [Reason.BLOCKED]
    assert museum.times == []


async def test_news_come_at_once_and_without_news_there_is_an_answer_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    book = NewsBook()
    assert await book.beyond(None) == Heard()
    waiting = asyncio.create_task(book.beyond(Heard()))
    await asyncio.sleep(0.01)
    await book.pause("a.example", 7.0)
    paused = Heard({"a.example": 7.0})
    assert await waiting == await book.beyond(Heard()) == paused
    waiting = asyncio.create_task(book.beyond(paused))
    await asyncio.sleep(0.01)
    await book.block("b.example")
    assert await waiting == Heard({"a.example": 7.0}, {"b.example"})
    monkeypatch.setattr(news, "PATIENCE_S", 0.01)
    assert await book.beyond(await book.beyond(None)) == Heard({"a.example": 7.0}, {"b.example"})
