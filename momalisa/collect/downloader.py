"""A polite downloader: few connections and requests to a host, patience when asked for it, and no for an answer.

Every URL ends as a `Fetched`, bytes or a reason; nothing raises. Before the first request to a host its robots.txt is
read. A host that answers with a challenge page for people has said no: all its URLs end as `blocked` at once. Private
addresses are refused by the address that a name resolves to, on every redirect too.
"""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import BinaryIO

import aiohttp
from yarl import URL

from momalisa.collect.addresses import PublicResolver, is_private, private
from momalisa.collect.fetched import NOTHING_SAID, Ended, Fetched, TryAgain, Validators
from momalisa.collect.hosts import Hosts
from momalisa.collect.hygiene import is_html
from momalisa.collect.news import Heard, News
from momalisa.collect.pace import Pace, Share
from momalisa.collect.robots import ROBOTS_BYTES, RobotsFile, Rules, forbidden_by
from momalisa.config import Collect
from momalisa.records import Reason

MAX_REDIRECTS = 5
MAX_WAIT_S = 60.0  # a host that wants more patience than this gets its answer: an error
FIRST_WAIT_S = 0.5  # doubled at each attempt
PAGE_BYTES = 1 << 16  # of an error page, no more is read
IN_FLIGHT = 16  # pictures in memory at a time
SMALL_BYTES = 1 << 18  # a picture of so many is sooner used than handed to another thread and back
OK, NOT_MODIFIED = 200, 304
AGAIN = {408, 425, 429, 500, 502, 503, 504}
REDIRECTS = {301, 302, 303, 307, 308}
GONE = {404, 410}
Then = Callable[[int, Fetched], Awaitable[None]]
CHALLENGE_SIGNS = (
    b"just a moment",
    b"cf-chl",
    b"challenge-platform",
    b"captcha",
    b"are you human",
    b"not a robot",
    b"are a robot",
)


@dataclass(frozen=True)
class _Wanted:
    """One URL, and how it is asked for."""

    url: str
    max_bytes: int
    known: Validators = NOTHING_SAID  # of what we have
    obey_robots: bool = True
    cut: bool = False  # of a longer body, the first `max_bytes` will do
    file: BinaryIO | None = None  # where the body goes; None: into memory


class Downloader:
    """Fetches URLs in one event loop.

    `share` is this downloader's part of the connections and requests that a host is asked for; `hosts` is what is known
    about them before, and what this downloader learns is added to its own copy. `news`: what others must hear at once, too.
    """

    def __init__(
        self, settings: Collect, share: Share | None = None, hosts: Hosts | None = None, news: News | None = None
    ) -> None:
        self.settings, self.hosts, self.news = settings, (hosts or Hosts()).copy(), news
        share = share or Share(settings.per_host)
        self._paces: dict[str, Pace] = defaultdict(lambda: Pace(share))
        self._rules: dict[str, asyncio.Task[Rules]] = {}
        self._memory = asyncio.Semaphore(IN_FLIGHT)

    async def fetch_all(
        self, urls: Sequence[str], then: Callable[[int, Fetched], None], known: Sequence[Validators] | None = None
    ) -> None:
        """Fetch every URL; `then(index, fetched)` is called as each one ends, in any order: with a small body in this thread,
        with a larger one in one other thread, while this one goes on.

        `known`: validators of what we have of each URL: what has not changed ends as `not_modified`, without bytes.
        """
        # One thread: a task reserves one CPU, and more threads would only wait for each other.
        with ThreadPoolExecutor(1) as thread:

            async def used(index: int, fetched: Fetched) -> None:
                if len(fetched.data) <= SMALL_BYTES:
                    then(index, fetched)
                else:
                    await asyncio.get_running_loop().run_in_executor(thread, then, index, fetched)

            await self._fetch_each(urls, used, known)

    async def _fetch_each(self, urls: Sequence[str], then: Then, known: Sequence[Validators] | None) -> None:
        async with self._session() as session, self._hearing(), asyncio.TaskGroup() as group:
            for index, url in enumerate(urls):
                wanted = _Wanted(url, self.settings.max_bytes, known[index] if known else NOTHING_SAID, self.settings.obey_robots)
                group.create_task(self._one(session, index, wanted, then))

    @asynccontextmanager
    async def _hearing(self) -> AsyncIterator[None]:
        """Meanwhile this downloader rests where a host has asked another one to, and asks no host that told another one no."""
        if self.news is None:
            yield
            return
        listening = asyncio.create_task(self._listen(self.news, await self.news.beyond(None)))
        try:
            yield
        finally:
            listening.cancel()

    async def _listen(self, news: News, heard: Heard) -> None:
        while True:
            for host, until in heard.pauses.items():
                self._paces[host].rest(until)
            self.hosts.blocked |= heard.blocked
            heard = await news.beyond(heard)

    async def save(self, url: str, file: BinaryIO, max_bytes: int, known: Validators = NOTHING_SAID) -> Fetched:
        """Fetch what the settings themselves name into a file: without a look at robots.txt, and never into memory.

        `known`: validators of what we have; what has not changed ends as `not_modified`, and nothing is written.
        """
        async with self._session() as session:
            return await self._fetch(session, _Wanted(url, max_bytes, known, obey_robots=False, file=file))

    async def _one(self, session: aiohttp.ClientSession, index: int, wanted: _Wanted, then: Then) -> None:
        try:
            fetched = await self._fetch(session, wanted)
        except Exception as error:  # nobody thought of it: it costs its own URL, and not the block's others
            fetched = Fetched(error=f"{type(error).__name__}: {error}", reason=Reason.UNREACHABLE)
        try:
            await then(index, fetched)
        finally:
            self._forget(fetched)

    def _forget(self, fetched: Fetched) -> None:
        """Its bytes are used: others may come into memory."""
        if fetched.data:
            self._memory.release()

    def _session(self) -> aiohttp.ClientSession:
        resolver = aiohttp.ThreadedResolver() if self.settings.allow_private_addresses else PublicResolver()
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, limit=0),
            headers={"User-Agent": self.settings.user_agent, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=self.settings.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _fetch(self, session: aiohttp.ClientSession, wanted: _Wanted) -> Fetched:
        """One URL with its retries."""
        attempts = self.settings.attempts
        for attempt in range(1, attempts + 1):
            try:
                return await self._follow(session, wanted)
            except Ended as end:
                return Fetched(error=str(end), reason=end.reason, status=end.status)
            except TryAgain as again:
                failed = Fetched(error=str(again), reason=again.reason, status=again.status)
                if again.wait_s > MAX_WAIT_S:
                    return replace(failed, error=f"{again}; the host asks to wait {again.wait_s:.0f} s")
            if attempt < attempts:
                await asyncio.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), MAX_WAIT_S) * random.uniform(0.5, 1.0))
        return replace(failed, error=f"{failed.error} ({attempts} attempts)")

    async def _follow(self, session: aiohttp.ClientSession, wanted: _Wanted) -> Fetched:
        """One attempt, through redirects. Raises Ended or TryAgain."""
        try:
            url = URL(wanted.url)
            for _ in range(MAX_REDIRECTS + 1):
                self._judge(url)
                answer = await self._ask(session, url, wanted)
                if isinstance(answer, Fetched):
                    return answer
                url = url.join(URL(answer))
            raise Ended(Reason.HTTP_ERROR, f"more than {MAX_REDIRECTS} redirects")
        except TimeoutError:
            raise TryAgain(Reason.TIMEOUT, f"no answer within timeout_s={self.settings.timeout_s:g}") from None
        except aiohttp.InvalidURL as error:
            raise Ended(Reason.REFUSED, f"not a URL: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise TryAgain(Reason.UNREACHABLE, f"{type(error).__name__}: {error}") from None
        except ValueError as error:
            raise Ended(Reason.REFUSED, f"not a URL: {error}") from None

    def _judge(self, url: URL) -> None:
        """Raises Ended for a URL that must not be asked for."""
        if url.scheme not in ("http", "https") or not url.host:
            raise Ended(Reason.REFUSED, f"not an http(s) URL: {url}")
        if url.host in self.hosts.blocked:
            raise _blocked(url.host)
        if self.settings.allow_private_addresses:
            return
        with suppress(ValueError):  # a name: the resolver judges what it stands for
            if is_private(url.host):
                raise private(url.host, url.host)

    async def _ask(self, session: aiohttp.ClientSession, url: URL, wanted: _Wanted) -> Fetched | str:
        """One request: what came of it, or where it was redirected to."""
        interval_s = 1.0 / self.settings.requests_per_second
        if wanted.obey_robots:
            rules = await self._rules_of(session, url)
            rules.judge(str(url))
            interval_s = max(interval_s, rules.delay_s)
        pace = self._paces[url.host or ""]
        async with pace.connections:
            self._judge(url)  # others may have found its host blocked meanwhile: then there is no turn to wait for
            await self._memory.acquire()  # until the bytes are used; waited for before the request, whose time is limited
            answer: Fetched | str = Fetched()
            try:
                await pace.turn(interval_s)
                self._judge(url)  # and once more, for a turn can be long in coming
                async with session.get(url, allow_redirects=False, headers=wanted.known.headers) as response:
                    if response.status in REDIRECTS and "Location" in response.headers:
                        answer = response.headers["Location"]
                    else:
                        answer = await self._read(response, wanted)
            finally:
                if isinstance(answer, str) or not answer.data:
                    self._memory.release()
        return answer

    async def _rules_of(self, session: aiohttp.ClientSession, url: URL) -> Rules:
        """The rules of a host, whose robots.txt is read once."""
        origin = str(url.origin())
        if origin not in self._rules:
            self._rules[origin] = asyncio.create_task(self._read_robots(session, origin))
        return await self._rules[origin]

    async def _read_robots(self, session: aiohttp.ClientSession, origin: str) -> Rules:
        if origin not in self.hosts.robots:
            wanted = _Wanted(f"{origin}/robots.txt", ROBOTS_BYTES, obey_robots=False, cut=True)
            fetched = await self._fetch(session, wanted)
            self._forget(fetched)
            self.hosts.robots[origin] = RobotsFile.from_fetched(fetched)
        return Rules(self.hosts.robots[origin], self.settings.user_agent)

    async def _read(self, response: aiohttp.ClientResponse, wanted: _Wanted) -> Fetched:
        """The body, if it is what was asked for and not too much of it."""
        status, good, length = response.status, response.status == OK, response.content_length or 0
        tag = forbidden_by(response.headers.getall("X-Robots-Tag", ()), self.settings.user_agent)
        if tag and wanted.obey_robots and status in (OK, NOT_MODIFIED):
            raise Ended(Reason.DISALLOWED, f"X-Robots-Tag: {tag}")
        if status == NOT_MODIFIED and wanted.known:
            return Fetched(reason=Reason.NOT_MODIFIED)
        if good and length > wanted.max_bytes and not wanted.cut:
            raise Ended(Reason.TOO_LARGE, f"{length} bytes, more than max_bytes={wanted.max_bytes}")
        limit = wanted.max_bytes if good else PAGE_BYTES
        body = wanted.file if wanted.file and good else io.BytesIO()
        start, size = await _copied(response, body, limit)
        if _is_challenge(response, start):
            await self._block(response.url.host or "")
            raise _blocked(response.url.host or "")
        if status in AGAIN:
            wait_s = retry_after_s(response.headers.get("Retry-After", ""))
            await self._rest(response.url.host or "", min(wait_s, MAX_WAIT_S))
            raise TryAgain(Reason.HTTP_ERROR, f"HTTP {status}", status, wait_s)
        if not good:
            raise Ended(Reason.NOT_FOUND if status in GONE else Reason.HTTP_ERROR, f"HTTP {status}", status)
        if size > limit and not wanted.cut:
            raise Ended(Reason.TOO_LARGE, f"more bytes than max_bytes={wanted.max_bytes}")
        validators = Validators.from_headers(response.headers)
        return Fetched(body.getvalue()[:limit] if isinstance(body, io.BytesIO) else b"", validators=validators)

    async def _rest(self, host: str, wait_s: float) -> None:
        """The host wants no request for so long, whoever of us makes it."""
        until = time.time() + wait_s
        self._paces[host].rest(until)
        if self.news is not None and wait_s:
            await self.news.pause(host, until)

    async def _block(self, host: str) -> None:
        """The host has said no, to whoever of us asks."""
        self.hosts.blocked.add(host)
        if self.news is not None:
            await self.news.block(host)


async def _copied(response: aiohttp.ClientResponse, body: BinaryIO, limit: int) -> tuple[bytes, int]:
    """Write a response's body until it is more than `limit` bytes; returns its start and how much was read."""
    body.seek(0)
    body.truncate()  # what an attempt before this one left
    start, size = b"", 0
    async for part in response.content.iter_any():
        if len(start) < PAGE_BYTES:
            start += part[:PAGE_BYTES]
        body.write(part)
        size += len(part)
        if size > limit:
            break
    return start[:PAGE_BYTES], size


def _is_challenge(response: aiohttp.ClientResponse, start: bytes) -> bool:
    """A page that asks whether we are people. We are not, so its host is left alone from now on."""
    if "challenge" in response.headers.get("cf-mitigated", ""):
        return True
    return is_html(start) and any(sign in start.lower() for sign in CHALLENGE_SIGNS)


def _blocked(host: str) -> Ended:
    return Ended(Reason.BLOCKED, f"blocked: {host} answers robots with a challenge page")


def retry_after_s(header: str) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 if it is neither."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):  # a date may be out of every calendar
        return 0.0
