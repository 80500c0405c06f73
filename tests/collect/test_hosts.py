from __future__ import annotations

import pytest

from momalisa.collect import hosts
from momalisa.collect.hosts import HostBook, Hosts, origin_of
from momalisa.collect.robots import RobotsFile
from momalisa.records import Reason

A, B = "https://a.example", "https://b.example"


def test_the_origin_of_a_url() -> None:
    assert origin_of("https://a.example/x.jpg?y") == A
    assert origin_of("http://a.example:8080/") == "http://a.example:8080"
    assert origin_of("no url") == origin_of("http://[::1") == ""


def test_a_block_waits_while_another_one_learns_about_its_host() -> None:
    book = HostBook()
    assert book.begin({A}) == Hosts()
    assert not book.may_begin({A, B})
    assert book.may_begin({B})
    book.finish({A}, Hosts({"b.example"}, {A: RobotsFile("rules")}))
    assert book.may_begin({A, B})
    assert book.begin({A, B}) == Hosts({"b.example"}, {A: RobotsFile("rules")})
    assert book.may_begin({A})
    assert not book.may_begin({B})


def test_a_host_about_which_nothing_could_be_learned_holds_up_nobody_twice() -> None:
    book = HostBook()
    book.begin({A})
    book.finish({A}, Hosts())
    book.begin({A})
    assert book.may_begin({A})


def test_what_was_learned_grows_old_and_bad_news_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    now, book = 1000.0, HostBook()
    monkeypatch.setattr(hosts.time, "monotonic", lambda: now)
    book.finish({A, B}, Hosts(set(), {A: RobotsFile("rules"), B: RobotsFile("", Reason.UNREACHABLE, "gone")}))
    now += 301
    assert book.begin({A, B}).robots.keys() == {A}
    assert not book.may_begin({B})  # it is being learned again
    now += 24 * 3600
    assert book.begin({A}).robots == {}
