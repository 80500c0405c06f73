import asyncio
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from hypothesis import example, given
from hypothesis import strategies as st

from momalisa.collect import downloader
from momalisa.collect.addresses import PublicResolver, is_private
from momalisa.collect.downloader import Downloader, retry_after_s
from momalisa.collect.fetched import Fetched, Validators
from momalisa.collect.hosts import Hosts
from momalisa.collect.pace import Share
from momalisa.collect.robots import RobotsFile
from momalisa.config import Collect
from momalisa.records import Reason

TRUSTING = Collect(allow_private_addresses=True, attempts=3, timeout_s=5, max_bytes=10_000, requests_per_second=10_000)
CHALLENGE = "<!DOCTYPE html><title>Just a moment...</title>"


class Museum:
    """A server that behaves as its paths say, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.open = self.most_open = self.sent = 0
        self.times: list[float] = []
        self.robots = web.Response(status=404)
        self.app = web.Application()
        self.app.router.add_get("/{path:.*}", self.answer)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        kind = request.path.split("/")[1]
        self.asked[request.path] += 1
        self.times.append(time.time())
        if kind == "robots.txt":
            return web.Response(status=self.robots.status, body=self.robots.body, headers=self.robots.headers)
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

    async def say_hiccup(self, request: web.Request) -> web.StreamResponse:
        return await self.say_cut(request) if self.asked[request.path] < 2 else web.Response(body=b"at last")

    async def say_slow(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.6)
        return web.Response()

    async def say_tagged(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"art", headers={"X-Robots-Tag": request.query["tag"]})

    async def say_known(self, request: web.Request) -> web.StreamResponse:
        """A picture with validators, whose version is its query's `v`."""
        tag, date = f'"{request.query["v"]}"', "Sun, 06 Nov 1994 08:49:37 GMT"
        same = request.headers.get("If-None-Match") == tag or request.headers.get("If-Modified-Since") == date
        headers = {"ETag": tag} if "dated" not in request.path else {"Last-Modified": date}
        return web.Response(status=304, headers=headers) if same else web.Response(body=b"art", headers=headers)

    async def say_latin(self, request: web.Request) -> web.StreamResponse:
        """An ETag with a byte above 0x7F, which RFC 9110 allows (obs-text); aiohttp's own server would not write it."""
        assert request.transport is not None
        lines = [b"HTTP/1.1 200 OK", b'ETag: "caf\xe9"', b"Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT", b"Connection: close"]
        request.transport.write(b"\r\n".join([*lines, b"", b"art"]))  # type: ignore[attr-defined]
        request.transport.close()
        return web.StreamResponse()

    async def say_never(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, headers={"Retry-After": "Mon, 01 Jan 2024 00:00:00 +99999999999999999"})

    async def say_page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=int(request.query["status"]))

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


def fetch(
    urls: list[str],
    settings: Collect = TRUSTING,
    per_host: int = 2,
    hosts: Hosts | None = None,
    known: list[Validators] | None = None,
) -> list[Fetched]:
    results: dict[int, Fetched] = {}
    asyncio.run(Downloader(settings, Share(per_host), hosts).fetch_all(urls, results.__setitem__, known))
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
    ("path", "reason", "error", "asked"),
    [
        ("broken", Reason.HTTP_ERROR, r"HTTP 500 \(3 attempts\)", 3),
        ("never", Reason.HTTP_ERROR, r"HTTP 503 \(3 attempts\)", 3),
        ("holiday", Reason.HTTP_ERROR, "HTTP 503; the host asks to wait 86400 s", 1),
        ("missing", Reason.NOT_FOUND, "HTTP 404", 1),
        ("page?status=410", Reason.NOT_FOUND, "HTTP 410", 1),
        ("page?status=403", Reason.HTTP_ERROR, "HTTP 403", 1),
        ("page?status=304", Reason.HTTP_ERROR, "HTTP 304", 1),  # not an answer to a question without conditions
        ("big", Reason.TOO_LARGE, "10001 bytes, more than max_bytes=10000", 1),
        ("endless", Reason.TOO_LARGE, "more bytes than max_bytes=10000", 1),
        ("cut", Reason.UNREACHABLE, r"ClientPayloadError.*\(3 attempts\)", 3),
        ("circle", Reason.HTTP_ERROR, "more than 5 redirects", 6),
    ],
)
def test_what_cannot_be_had_is_an_error_that_says_why(
    museum: Museum, base: str, path: str, reason: Reason, error: str, asked: int
) -> None:
    fetched = fetch([f"{base}/{path}"])[0]
    assert (fetched.data, fetched.reason) == (b"", reason)
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(fetched.error)
    assert museum.asked[f"/{path}".split("?")[0]] == asked


def test_too_many_bytes_are_not_even_read(museum: Museum, base: str) -> None:
    assert fetch([f"{base}/endless"])[0].error == "more bytes than max_bytes=10000"
    assert museum.sent < 20_000_000  # of 40 MB: what network buffers hold


def test_a_host_that_does_not_answer_is_given_up(base: str) -> None:
    settings = TRUSTING.model_copy(update={"timeout_s": 0.1, "attempts": 2})
    slow, gone = fetch([f"{base}/slow", "http://127.0.0.1:1/x.jpg"], settings)
    assert (slow.reason, slow.error) == (Reason.TIMEOUT, "no answer within timeout_s=0.1 (2 attempts)")
    assert gone.reason == Reason.UNREACHABLE
    assert "(2 attempts)" in gone.error


@pytest.mark.parametrize(
    "url",
    ["", "picture.jpg", "file:///etc/hostname", "/etc/hostname", "ftp://a.b/c", "http://", "http://[::1", "http://a:b/c", "x\0y"],
)
def test_a_bad_url_is_an_error_and_not_a_crash(url: str) -> None:
    fetched = fetch([url])[0]
    assert (fetched.data, fetched.reason) == (b"", Reason.REFUSED)
    assert "URL" in fetched.error


def test_a_challenge_page_is_final_for_the_whole_host(museum: Museum, base: str) -> None:
    fetched = fetch([f"{base}/challenge", *(f"{base}/good/{number}" for number in range(20))], per_host=1)
    assert {one.error for one in fetched} == {"blocked: 127.0.0.1 answers robots with a challenge page"}
    assert {one.reason for one in fetched} == {Reason.BLOCKED}
    assert museum.asked == {"/robots.txt": 1, "/challenge": 1}


def test_a_challenge_in_place_of_robots_txt_is_final_too(museum: Museum, base: str) -> None:
    museum.robots = web.Response(status=403, text=CHALLENGE, content_type="text/html")
    assert {one.reason for one in fetch([f"{base}/good/{number}" for number in range(5)])} == {Reason.BLOCKED}
    assert museum.asked == {"/robots.txt": 1}


def test_a_host_that_is_known_to_be_blocked_is_not_asked(museum: Museum, base: str) -> None:
    assert fetch([f"{base}/good"], hosts=Hosts(blocked={"127.0.0.1"}))[0].reason == Reason.BLOCKED
    assert not museum.asked


def test_a_plain_error_page_does_not_block_the_host(base: str) -> None:
    assert [bool(one.data) for one in fetch([f"{base}/missing", f"{base}/good"], per_host=1)] == [False, True]


def test_robots_txt_is_read_once_and_obeyed(museum: Museum, base: str) -> None:
    museum.robots = web.Response(text="User-agent: *\nDisallow: /\n\nUser-agent: momalisa\nDisallow: /missing\nDisallow: /*/7$")
    fetched = fetch([f"{base}/missing", *(f"{base}/good/{number}" for number in range(9))])
    assert [one.reason for one in fetched] == [Reason.DISALLOWED] + [Reason.OK] * 7 + [Reason.DISALLOWED, Reason.OK]
    assert fetched[0].error == "robots.txt disallows it to momalisa"
    assert museum.asked["/robots.txt"] == 1
    assert museum.asked["/missing"] == museum.asked["/good/7"] == 0


def test_a_redirect_does_not_lead_around_robots_txt(museum: Museum, base: str) -> None:
    museum.robots = web.Response(text="User-agent: *\nDisallow: /good")
    assert fetch([f"{base}/moved?to=/good/there"])[0].reason == Reason.DISALLOWED
    assert museum.asked["/good/there"] == 0


@pytest.mark.parametrize(
    ("robots", "reason"),
    [
        (web.Response(status=403), Reason.OK),
        (web.Response(status=500), Reason.DISALLOWED),
        (web.Response(status=429), Reason.DISALLOWED),
        (web.Response(text="<!doctype html>\nUser-agent: *"), Reason.OK),
        (web.Response(status=301, headers={"Location": "/circle"}), Reason.DISALLOWED),
        (web.Response(text="User-agent: *\nAllow: /\n#" + "x" * 600_000 + "\nUser-agent: *\nDisallow: /"), Reason.OK),
    ],
    ids=["403", "500", "429", "page", "circle", "endless"],
)
def test_what_rfc_9309_says_of_a_robots_txt_that_cannot_be_read(
    museum: Museum, base: str, robots: web.Response, reason: Reason
) -> None:
    museum.robots = robots
    assert fetch([f"{base}/good/1", f"{base}/good/2"])[0].reason == reason
    assert museum.asked["/good/1"] == museum.asked["/good/2"] == (reason == Reason.OK)


def test_known_robots_files_are_not_asked_for_and_learned_ones_are_handed_on(museum: Museum, base: str) -> None:
    museum.robots = web.Response(text="User-agent: *\nDisallow: /good")
    first = Downloader(TRUSTING)
    asyncio.run(first.fetch_all([f"{base}/good"], lambda *_: None))
    assert first.hosts.robots == {base: RobotsFile("User-agent: *\nDisallow: /good")}
    assert fetch([f"{base}/good"], hosts=first.hosts)[0].reason == Reason.DISALLOWED
    assert museum.asked == {"/robots.txt": 1}


def test_robots_txt_may_be_left_aside_on_one_s_own_site(museum: Museum, base: str) -> None:
    museum.robots = web.Response(text="User-agent: *\nDisallow: /")
    settings = TRUSTING.model_copy(update={"obey_robots": False})
    assert [bool(one.data) for one in fetch([f"{base}/good", f"{base}/tagged?tag=noai"], settings)] == [True, True]
    assert "/robots.txt" not in museum.asked


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("noai", Reason.DISALLOWED),
        ("noindex, NoImageAI", Reason.DISALLOWED),
        ("momalisa: noai", Reason.DISALLOWED),
        ("otherbot: noai", Reason.OK),
        ("noindex", Reason.OK),
    ],
)
def test_pictures_that_nobody_may_learn_from_are_left_alone(base: str, tag: str, reason: Reason) -> None:
    assert fetch([f"{base}/tagged?tag={tag}"])[0].reason == reason


def test_requests_to_a_host_are_so_many_a_second_and_a_crawl_delay_is_longer(museum: Museum, base: str) -> None:
    settings = TRUSTING.model_copy(update={"requests_per_second": 20})
    fetch([f"{base}/good/{number}" for number in range(10)], settings, per_host=8)
    gaps = [after - before for before, after in zip(museum.times, museum.times[1:], strict=False)]
    assert sum(gaps) >= 9 * 0.05
    museum.times.clear()
    museum.robots = web.Response(text="User-agent: *\nCrawl-delay: 0.3")
    fetch([f"{base}/good/{number}" for number in range(4)], settings, per_host=8)
    assert museum.times[-1] - museum.times[1] >= 0.85  # the first was for robots.txt


def test_a_crawl_delay_that_nobody_can_wait_for_is_a_no(museum: Museum, base: str) -> None:
    museum.robots = web.Response(text="User-agent: *\nCrawl-delay: 3600")
    fetched = fetch([f"{base}/good"])[0]
    assert (fetched.reason, fetched.error) == (
        Reason.DISALLOWED,
        "robots.txt asks for 3600 s between requests, more than 60",
    )


@pytest.mark.parametrize("kind", ["known", "known/dated"])
def test_what_has_not_changed_is_not_sent_again(base: str, kind: str) -> None:
    url = f"{base}/{kind}?v=1"
    first = fetch([url])[0]
    assert first.data == b"art"
    assert bool(first.validators)
    assert fetch([url], known=[first.validators]) == [Fetched(reason=Reason.NOT_MODIFIED)]


def test_what_has_changed_is_sent_with_its_new_validators(base: str) -> None:
    changed = fetch([f"{base}/known?v=2"], known=[Validators('"1"')])[0]
    assert (changed.data, changed.validators) == (b"art", Validators('"2"'))


def test_validators_that_are_no_utf_8_are_passed_by(base: str) -> None:
    fetched = fetch([f"{base}/latin"])[0]
    assert (fetched.data, fetched.validators) == (b"art", Validators("", "Sun, 06 Nov 1994 08:49:37 GMT"))


def test_what_nobody_thought_of_costs_one_url_and_no_block(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(header: str) -> float:
        raise RuntimeError("nobody thought of it")

    monkeypatch.setattr(downloader, "retry_after_s", odd)
    broken, good = fetch([f"{base}/broken", f"{base}/good"])
    assert (broken.reason, broken.error) == (Reason.UNREACHABLE, "RuntimeError: nobody thought of it")
    assert good.data == b"/good"


def test_a_file_is_saved_without_being_held_and_only_the_last_attempt_stays(museum: Museum, base: str, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        fetched = asyncio.run(Downloader(TRUSTING).save(f"{base}/hiccup", file, 100_000))
        assert (fetched.reason, fetched.data) == (Reason.OK, b"")
        file.seek(0)
        assert file.read() == b"at last"
        assert asyncio.run(Downloader(TRUSTING).save(f"{base}/big", file, 100)).reason == Reason.TOO_LARGE
    assert "/robots.txt" not in museum.asked


def test_more_urls_than_memory_holds_all_come_to_an_end(base: str) -> None:
    kinds = ["good/1", "missing", "big", "tagged?tag=noai", "moved?to=/good/2", "cut", "circle"]
    urls = [f"{base}/{kinds[number % len(kinds)]}" for number in range(140)]
    fetched = fetch(urls, TRUSTING.model_copy(update={"attempts": 1}), per_host=20)
    assert Counter(one.reason for one in fetched) == {
        Reason.OK: 40, Reason.NOT_FOUND: 20, Reason.TOO_LARGE: 20, Reason.DISALLOWED: 20, Reason.UNREACHABLE: 20,
        Reason.HTTP_ERROR: 20,
    }  # fmt: skip


def test_while_a_large_picture_is_used_the_others_go_on(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloader, "SMALL_BYTES", len("/good/1"))
    small, waited = threading.Event(), []

    def use(index: int, fetched: Fetched) -> None:
        if index == 0:
            waited.append(small.wait(10))
        else:
            small.set()

    urls = [f"{base}/good/large", f"{base}/known?v=1", f"{base}/good/1"]
    asyncio.run(Downloader(TRUSTING, Share(1)).fetch_all(urls, use))
    assert waited == [True]


def test_redirects_are_followed(base: str) -> None:
    assert fetch([f"{base}/moved?to=/good/there"])[0].data == b"/good/there"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0x7f.0.0.1", "[::ffff:127.0.0.1]", "10.0.0.8", "169.254.169.254"]
)
def test_private_addresses_are_refused(host: str, base: str, museum: Museum) -> None:
    port = base.rsplit(":", 1)[1]
    fetched = fetch([f"http://{host}:{port}/good"], Collect(attempts=1, timeout_s=2))[0]
    assert fetched.reason == Reason.REFUSED
    assert "private address" in fetched.error
    assert "allow_private_addresses" in fetched.error
    assert not museum.asked


async def test_of_a_name_with_several_addresses_only_the_public_ones_are_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async def both(*_: object) -> list[dict[str, str]]:
        return [{"host": "10.0.0.8"}, {"host": "93.184.215.14"}, {"host": "127.0.0.1"}]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", both)
    assert await PublicResolver().resolve("museum.example") == [{"host": "93.184.215.14"}]


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
        ("64:ff9b::a9fe:a9fe", True),
        ("64:ff9b::808:808", False),
        ("64:ff9b:1::808:808", True),
        ("::7f00:1", True),
    ],
)
def test_which_addresses_are_private(address: str, private: bool) -> None:
    assert is_private(address) is private


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after_s("7") == 7
    assert 50 < retry_after_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after_s("") == retry_after_s("soon") == retry_after_s("-5") == retry_after_s("nan") == 0


TWO, ZONE = st.integers(0, 99).map("{:02}".format), st.integers(-(10**30), 10**30).map("{:+05}".format)
DATES = st.tuples(TWO, st.integers(0, 10**12), TWO, TWO, TWO, ZONE).map(
    "Mon, {0[0]} Jan {0[1]} {0[2]}:{0[3]}:{0[4]} {0[5]}".format
)


@given(st.one_of(DATES, st.text(), st.floats().map(str)))
@example("Mon, 01 Jan 2024 00:00:00 +99999999999999999")
def test_whatever_a_host_writes_as_retry_after_is_some_seconds(header: str) -> None:
    assert retry_after_s(header) >= 0
