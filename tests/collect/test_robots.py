from __future__ import annotations

import pytest

from momalisa.collect.fetched import Ended, Fetched
from momalisa.collect.robots import RobotsFile, Rules, forbidden_by, product
from momalisa.records import Reason

AGENT = "momalisa/0.1 (art; see README)"


@pytest.mark.parametrize(
    ("text", "path", "allowed"),
    [
        ("", "/a", True),
        ("User-agent: *\nDisallow: /a", "/a/b", False),
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b", True),  # the longest match wins
        ("User-agent: *\nDisallow: /\nUser-agent: MomaLisa\nAllow: /", "/a", True),
        ("User-agent: momalisa\nDisallow: /", "/a", False),
        ("User-agent: lisa\nDisallow: /", "/a", True),
        ("User-agent: *\nDisallow: /*.jpg$", "/a.jpg", False),
        ("User-agent: *\nDisallow: /caf%C3%A9", "/café", False),
    ],
)
def test_rules_are_read_as_rfc_9309_says(text: str, path: str, allowed: bool) -> None:
    rules = Rules(RobotsFile(text), AGENT)
    if allowed:
        rules.judge(f"https://museum.example{path}")
    else:
        with pytest.raises(Ended, match=r"robots.txt disallows it to momalisa"):
            rules.judge(f"https://museum.example{path}")


@pytest.mark.parametrize(
    ("text", "delay_s"),
    [
        ("User-agent: *\nDisallow: /a", 0),
        ("User-agent: *\nCrawl-delay: 2.5", 2.5),
        ("User-agent: *\nRequest-rate: 1/10", 10),
        ("User-agent: *\nCrawl-delay: 3\nUser-agent: momalisa\nCrawl-delay: 1", 1),
        ("User-agent: *\nCrawl-delay: soon", 0),
    ],
)
def test_how_long_to_wait_between_requests(text: str, delay_s: float) -> None:
    assert Rules(RobotsFile(text), AGENT).delay_s == delay_s


def test_a_file_that_cannot_be_read_is_a_no_with_its_reason() -> None:
    assert RobotsFile.from_fetched(Fetched(reason=Reason.NOT_FOUND, error="HTTP 404", status=404)) == RobotsFile()
    broken = RobotsFile.from_fetched(Fetched(reason=Reason.HTTP_ERROR, error="HTTP 503", status=503))
    silent = RobotsFile.from_fetched(Fetched(reason=Reason.TIMEOUT, error="no answer"))
    for file, reason in ((broken, Reason.DISALLOWED), (silent, Reason.TIMEOUT)):
        with pytest.raises(Ended) as caught:
            Rules(file, AGENT).judge("https://museum.example/a")
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ([], ""),
        (["noindex", "noai"], "noai"),
        (["noindex,noimageai"], "noimageai"),
        (["MOMALISA: noai"], "noai"),
        (["other: noai", "noarchive"], ""),
        (["unavailable_after: 25 Jun 2027 15:00:00 PST"], ""),
        (["noai, noimageai, max-image-preview:large"], "noai"),
        (["max-image-preview: large, NoImageAI"], "noimageai"),
        (["otherbot: noindex, momalisa: noai"], "noai"),
        (["otherbot: noindex, noai"], ""),
        (["momalisa: noindex, otherbot: noai"], ""),
        (["otherbot: noindex, MomaLisa/1.0 : max-snippet:-1, noai"], "noai"),
        (["unavailable_after: Fri, 25 Jun 2027 15:00:00 GMT, noai"], "noai"),
        (["otherbot: noai", "noai"], "noai"),
    ],
)
def test_which_headers_forbid_learning(tags: list[str], found: str) -> None:
    assert forbidden_by(tags, AGENT) == found


def test_the_name_that_robots_txt_may_address() -> None:
    assert product(AGENT) == "momalisa"
    assert product("my-museum (me@museum.example)") == "my-museum"
