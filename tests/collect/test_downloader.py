import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate

import pytest
from aiohttp import web

from momalisa.collect import downloader
from momalisa.collect.downloader import Downloader, Fetched, is_private, retry_after_s
from momalisa.config import Collect
from momalisa.miniature.wing import serve_in_thread

TRUSTING = Collect(allow_private_addresses=True, attempts=3, timeout_s=5, max_bytes=10_000)
CHALLENGE = "<!DOCTYPE html><title>Just a moment...</title>"


class Museum:
    """A server that behaves as its paths say, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.open = self.most_open = self.sent = 0
        self.app = web.Application()
        self.app.router.add_get("/{path:.*}", self.answer)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        kind = request.path.split("/")[1]
        self.asked[request.path] += 1
        self.agents.add(request.headers["User-Agent"])
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await getattr(self, f"say_{kind}")(request)
        finally:
            self.open -= 1

    async def say_good(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return web.Response(body=request.path.encode())

    async def say_busy(self, request: web.Request) -> web.StreamResponse:
        if self.asked[request.path] < 2:
            return web.Response(status=429, headers={"Retry-After": "0.3"})
        return web.Response(body=b"at last")

    async def say_broken(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    async def say_holiday(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, headers={"Retry-After": "86400"})

    async def say_missing(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=404, text="<html>not here</html>", content_type="text/html")

    async def say_challenge(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=403, text=CHALLENGE, content_type="text/html")

    async def say_big(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(10_001))

    async def say_endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(400):
            await response.write(bytes(100_000))
            self.sent += 100_000
        return response

    async def say_cut(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "5000"})
        await response.prepare(request)
        await response.write(bytes(100))
        assert request.transport is not None
        request.transport.close()
        return response

    async def say_slow(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.6)
        return web.Response()

    async def say_moved(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": request.query["to"]})

    async def say_circle(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=301, headers={"Location": "/circle"})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloader, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def museum() -> Museum:
    return Museum()


@pytest.fixture
def base(museum: Museum) -> Iterator[str]:
    with serve_in_thread(museum.app) as address:
        yield address


def fetch(urls: list[str], settings: Collect = TRUSTING, per_host: int = 2) -> list[Fetched]:
    results: dict[int, Fetched] = {}
    asyncio.run(Downloader(settings, per_host).fetch_all(urls, results.__setitem__))
    return [results[index] for index in range(len(urls))]


def test_every_url_gets_its_own_bytes_with_few_connections(museum: Museum, base: str) -> None:
    urls = [f"{base}/good/{number}" for number in range(24)]
    assert fetch(urls, per_host=3) == [Fetched(data=f"/good/{number}".encode()) for number in range(24)]
    assert museum.most_open == 3
    assert museum.agents == {TRUSTING.user_agent}


def test_too_many_requests_are_repeated_when_the_host_says(museum: Museum, base: str) -> None:
    began = time.monotonic()
    assert fetch([f"{base}/busy"]) == [Fetched(data=b"at last")]
    assert time.monotonic() - began >= 0.3
    assert museum.asked["/busy"] == 2


@pytest.mark.parametrize(
    ("path", "error", "asked"),
    [
        ("broken", r"HTTP 500 \(3 attempts\)", 3),
        ("holiday", "HTTP 503; the host asks to wait 86400 s", 1),
        ("missing", "HTTP 404", 1),
        ("big", "10001 bytes, more than max_bytes=10000", 1),
        ("endless", "more bytes than max_bytes=10000", 1),
        ("cut", r"ClientPayloadError.*\(3 attempts\)", 3),
        ("circle", "more than 5 redirects", 6),
    ],
)
def test_what_cannot_be_had_is_an_error_that_says_why(museum: Museum, base: str, path: str, error: str, asked: int) -> None:
    fetched = fetch([f"{base}/{path}"])[0]
    assert fetched.data == b""
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(fetched.error)
    assert museum.asked[f"/{path}"] == asked


def test_too_many_bytes_are_not_even_read(museum: Museum, base: str) -> None:
    assert fetch([f"{base}/endless"])[0].error == "more bytes than max_bytes=10000"
    assert museum.sent < 20_000_000  # of 40 MB: what network buffers hold


def test_a_host_that_does_not_answer_is_given_up(base: str) -> None:
    settings = TRUSTING.model_copy(update={"timeout_s": 0.1, "attempts": 2})
    assert fetch([f"{base}/slow"], settings)[0].error == "no answer within timeout_s=0.1 (2 attempts)"
    assert "(2 attempts)" in fetch(["http://127.0.0.1:1/x.jpg"], settings)[0].error


@pytest.mark.parametrize(
    "url",
    ["", "picture.jpg", "file:///etc/hostname", "/etc/hostname", "ftp://a.b/c", "http://", "http://[::1", "http://a:b/c", "x\0y"],
)
def test_a_bad_url_is_an_error_and_not_a_crash(url: str) -> None:
    fetched = fetch([url])[0]
    assert fetched.data == b""
    assert "URL" in fetched.error


def test_a_challenge_page_is_final_for_the_whole_host(museum: Museum, base: str) -> None:
    fetched = fetch([f"{base}/challenge", *(f"{base}/good/{number}" for number in range(20))], per_host=1)
    assert {one.error for one in fetched} == {"blocked: 127.0.0.1 answers robots with a challenge page"}
    assert museum.asked.total() == 1


def test_a_plain_error_page_does_not_block_the_host(base: str) -> None:
    assert [bool(one.data) for one in fetch([f"{base}/missing", f"{base}/good"], per_host=1)] == [False, True]


def test_redirects_are_followed(base: str) -> None:
    assert fetch([f"{base}/moved?to=/good/there"])[0].data == b"/good/there"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0x7f.0.0.1", "[::ffff:127.0.0.1]", "10.0.0.8", "169.254.169.254"]
)
def test_private_addresses_are_refused(host: str, base: str, museum: Museum) -> None:
    port = base.rsplit(":", 1)[1]
    fetched = fetch([f"http://{host}:{port}/good"], Collect(attempts=1, timeout_s=2))[0]
    assert "private address" in fetched.error
    assert "allow_private_addresses" in fetched.error
    assert not museum.asked


def test_a_redirect_to_a_private_address_is_refused(base: str, museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloader, "is_private", lambda address: address != "127.0.0.1")  # as if the museum were public
    port = base.rsplit(":", 1)[1]
    for target in (f"http://127.0.0.2:{port}/good", "http://169.254.169.254/latest/meta-data"):
        assert "private address" in fetch([f"{base}/moved?to={target}"], Collect())[0].error
    assert "not an http" in fetch([f"{base}/moved?to=file:///etc/hostname"], Collect())[0].error
    assert "/good" not in museum.asked


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("8.8.8.8", False),
        ("2606:4700::1111", False),
        ("192.168.1.4", True),
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("224.0.0.1", True),
        ("fe80::1%eth0", True),
        ("fd00::1", True),
        ("::ffff:10.0.0.1", True),
        ("2002:7f00:1::", True),
    ],
)
def test_which_addresses_are_private(address: str, private: bool) -> None:
    assert is_private(address) is private


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after_s("7") == 7
    assert 50 < retry_after_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after_s("") == retry_after_s("soon") == retry_after_s("-5") == retry_after_s("nan") == 0
