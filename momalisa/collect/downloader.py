"""A polite downloader: few connections to a host, patience when asked for it, and no for an answer.

Every URL ends as bytes or as an error; nothing raises. A host that answers with a challenge page for people has said
no: all its URLs end as `blocked` at once. Private addresses are refused by the address that a name resolves to, on
every redirect too, because a collection file is written by others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.abc import ResolveResult
from yarl import URL

from momalisa.collect.hygiene import is_html
from momalisa.config import Collect

MAX_REDIRECTS = 5
MAX_WAIT_S = 60.0  # a host that wants more patience than this gets its answer: an error
FIRST_WAIT_S = 0.5  # doubled at each attempt
PAGE_BYTES = 1 << 16  # of an error page, no more is read
IN_FLIGHT = 16  # pictures in memory at a time
AGAIN = {408, 425, 429, 500, 502, 503, 504}
REDIRECTS = {301, 302, 303, 307, 308}
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
class Fetched:
    """What became of a URL: its bytes, or an error that says why there are none."""

    data: bytes = b""
    error: str = ""


class Refused(Exception):
    """No bytes, and no sense in trying again."""


class TryAgain(Exception):
    """No bytes this time."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # what the host asked for


def is_private(address: str) -> bool:
    """Whether an IP address is not on the public internet."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    return not ip.is_global or ip.is_multicast


class _PublicResolver(aiohttp.ThreadedResolver):
    """Names -> public addresses; the address that was judged is the one connected to."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        public = [result for result in found if not is_private(result["host"])]
        if found and not public:
            raise Refused(_private_message(host, found[0]["host"]))
        return public


def _private_message(host: str, address: str) -> str:
    return f"{host} is the private address {address}; collect.allow_private_addresses=true would fetch from it"


@dataclass
class _Host:
    slots: asyncio.Semaphore
    resume_at: float = 0.0  # time.monotonic() before which the host wants no request


class Downloader:
    """Fetches URLs in one event loop.

    `per_host` is this downloader's own share of the connections to a host; `blocked` are hosts that have said no, and
    those that do so now are added to it; `max_bytes` stands in for the settings' own limit.
    """

    def __init__(self, settings: Collect, per_host: int, blocked: Iterable[str] = (), max_bytes: int | None = None) -> None:
        self.settings = settings
        self.blocked = set(blocked)
        self.max_bytes = max_bytes or settings.max_bytes
        self._hosts: dict[str, _Host] = defaultdict(lambda: _Host(asyncio.Semaphore(per_host)))

    async def fetch_all(self, urls: Sequence[str], then: Callable[[int, Fetched], None]) -> None:
        """Fetch every URL; `then(index, fetched)` is called in a thread as each one ends, in any order."""
        in_flight = asyncio.Semaphore(IN_FLIGHT)
        async with self._session() as session:

            async def one(index: int, text: str) -> None:
                host = self._hosts[_host_of(text)]
                async with host.slots:
                    await in_flight.acquire()  # until `then` is done with the bytes; the connection is free before that
                    fetched = await self._fetch(session, text, host)
                try:
                    await asyncio.to_thread(then, index, fetched)
                finally:
                    in_flight.release()

            async with asyncio.TaskGroup() as group:
                for index, text in enumerate(urls):
                    group.create_task(one(index, text))

    def _session(self) -> aiohttp.ClientSession:
        resolver = aiohttp.ThreadedResolver() if self.settings.allow_private_addresses else _PublicResolver()
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, limit=0),
            headers={"User-Agent": self.settings.user_agent, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=self.settings.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _fetch(self, session: aiohttp.ClientSession, text: str, host: _Host) -> Fetched:
        """One URL with its retries."""
        for attempt in range(1, self.settings.attempts + 1):
            await asyncio.sleep(max(0.0, host.resume_at - time.monotonic()))
            try:
                return Fetched(data=await self._follow(session, text))
            except Refused as refused:
                return Fetched(error=str(refused))
            except TryAgain as again:
                reason, asked_s = str(again), again.wait_s
                if asked_s > MAX_WAIT_S:
                    return Fetched(error=f"{reason}; the host asks to wait {asked_s:.0f} s")
                host.resume_at = max(host.resume_at, time.monotonic() + asked_s)
            if attempt < self.settings.attempts:
                await asyncio.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), MAX_WAIT_S) * random.uniform(0.5, 1.0))
        return Fetched(error=f"{reason} ({self.settings.attempts} attempts)")

    async def _follow(self, session: aiohttp.ClientSession, text: str) -> bytes:
        """One attempt, through redirects. Raises Refused or TryAgain."""
        try:
            url = URL(text)
            for _ in range(MAX_REDIRECTS + 1):
                self._judge(url)
                async with session.get(url, allow_redirects=False) as response:
                    if response.status not in REDIRECTS or "Location" not in response.headers:
                        return await self._read(response)
                    url = url.join(URL(response.headers["Location"]))
            raise Refused(f"more than {MAX_REDIRECTS} redirects")
        except TimeoutError:
            raise TryAgain(f"no answer within timeout_s={self.settings.timeout_s:g}") from None
        except aiohttp.InvalidURL as error:
            raise Refused(f"not a URL: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from None
        except ValueError as error:
            raise Refused(f"not a URL: {error}") from None

    def _judge(self, url: URL) -> None:
        """Raises Refused for a URL that must not be asked for."""
        if url.scheme not in ("http", "https") or not url.host:
            raise Refused(f"not an http(s) URL: {url}")
        if url.host in self.blocked:
            raise Refused(_blocked_message(url.host))
        if self.settings.allow_private_addresses:
            return
        with suppress(ValueError):  # a name: the resolver judges what it stands for
            if is_private(url.host):
                raise Refused(_private_message(url.host, url.host))

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """The body, if it is what was asked for and not too much of it."""
        good = response.status == 200
        if good and (response.content_length or 0) > self.max_bytes:
            raise Refused(f"{response.content_length} bytes, more than max_bytes={self.max_bytes}")
        limit = self.max_bytes if good else PAGE_BYTES
        parts, size = [], 0
        async for part in response.content.iter_chunked(1 << 16):
            parts.append(part)
            size += len(part)
            if size > limit:
                break
        body = b"".join(parts)
        if _is_challenge(response, body[:PAGE_BYTES]):
            host = response.url.host or ""
            self.blocked.add(host)
            raise Refused(_blocked_message(host))
        if response.status in AGAIN:
            raise TryAgain(f"HTTP {response.status}", retry_after_s(response.headers.get("Retry-After", "")))
        if not good:
            raise Refused(f"HTTP {response.status}")
        if size > limit:
            raise Refused(f"more bytes than max_bytes={self.max_bytes}")
        return body


def _is_challenge(response: aiohttp.ClientResponse, start: bytes) -> bool:
    """A page that asks whether we are people. We are not, so its host is left alone from now on."""
    if "challenge" in response.headers.get("cf-mitigated", ""):
        return True
    lower = start.lower()
    return is_html(start) and any(sign in lower for sign in CHALLENGE_SIGNS)


def _host_of(text: str) -> str:
    with suppress(ValueError):
        return URL(text).host or ""
    return ""


def _blocked_message(host: str) -> str:
    return f"blocked: {host} answers robots with a challenge page"


def retry_after_s(header: str) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 if it is neither."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
