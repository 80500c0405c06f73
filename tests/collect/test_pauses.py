"""What a host asks of one worker, all of a run do."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp import web

from momalisa.collect import pauses
from momalisa.collect.downloader import Downloader
from momalisa.collect.fetched import Fetched
from momalisa.collect.pace import Share
from momalisa.collect.pauses import PauseBook
from momalisa.config import Collect

SETTINGS = Collect(allow_private_addresses=True, attempts=3, obey_robots=False, requests_per_second=20)


class Museum:
    """Asks the first visitor to come again in a second."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.app = web.Application()
        self.app.router.add_get("/{number}", self.answer)

    async def answer(self, request: web.Request) -> web.Response:
        self.times.append(time.time())
        if len(self.times) == 1:
            return web.Response(status=429, headers={"Retry-After": "3"})
        return web.Response(body=b"art")


@pytest.fixture
def museum() -> Museum:
    return Museum()


async def fetch(urls: list[str], share: Share, book: PauseBook) -> list[Fetched]:
    found: dict[int, Fetched] = {}
    await Downloader(SETTINGS, share, pauses=book).fetch_all(urls, found.__setitem__)
    return [found[index] for index in range(len(urls))]


async def test_a_host_that_asks_one_worker_to_wait_is_left_alone_by_the_others(museum: Museum, base: str) -> None:
    urls, book = [f"{base}/{number}" for number in range(20)], PauseBook()
    ours, theirs = await asyncio.gather(fetch(urls[:10], Share(2, 0, 2), book), fetch(urls[10:], Share(2, 1, 2), book))
    assert [one.data for one in (*ours, *theirs)] == [b"art"] * 20
    asked = museum.times[0]
    assert not [at - asked for at in museum.times if 2 < at - asked < 2.99]
    assert sum(at - asked >= 2.99 for at in museum.times) >= 10


async def test_who_begins_in_a_pause_keeps_it(museum: Museum, base: str) -> None:
    museum.times.append(0.0)
    book, until = PauseBook(), time.time() + 0.5
    await book.add("127.0.0.1", until)
    await book.add("127.0.0.1", until - 1)  # of two the longer one counts
    await book.add("elsewhere.example", until + 60)
    assert [one.data for one in await fetch([f"{base}/1"], Share(), book)] == [b"art"]
    assert museum.times[1] >= until - 0.01


async def test_news_come_at_once_and_without_news_there_is_an_answer_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    book = PauseBook()
    assert await book.beyond(None) == {}
    waiting = asyncio.create_task(book.beyond({}))
    await asyncio.sleep(0.01)
    await book.add("a.example", 7.0)
    assert await waiting == await book.beyond({}) == {"a.example": 7.0}
    monkeypatch.setattr(pauses, "PATIENCE_S", 0.01)
    assert await book.beyond({"a.example": 7.0}) == {"a.example": 7.0}
