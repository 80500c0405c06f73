"""robots.txt (RFC 9309) and X-Robots-Tag: what a host does not want robots to fetch, and how often it wants to be asked.

what it answers       what may be fetched                                     RFC 9309
rules                 what they allow to our name, else to `*`                2.2
4xx                   everything (but after 429 nothing, like 5xx)            2.3.1.3
5xx, no answer        nothing: all its works end as `disallowed` (5xx),
                      `timeout` or `unreachable`                              2.3.1.4
more than 500 KiB     what the first 500 KiB allow                            2.5
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from protego import Protego

from momalisa.collect.fetched import Ended, Fetched
from momalisa.records import Reason

ROBOTS_BYTES = 500 * 1024
TOO_MANY_REQUESTS = 429
NO_AI = {"noai", "noimageai"}
WITH_VALUES = {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}  # directives, not robots' names
ADDRESSED = re.compile(r"\s*([A-Za-z][^\s:]*)\s*:(.*)", re.DOTALL)
MAX_DELAY_S = 60.0  # a host that wants us to wait longer between two pictures does not want us


@dataclass(frozen=True)
class RobotsFile:
    """What a host answered to /robots.txt: its text, or why nothing may be fetched from it. It travels between workers."""

    text: str = ""
    reason: Reason = Reason.OK
    error: str = ""

    @classmethod
    def from_fetched(cls, fetched: Fetched) -> RobotsFile:
        if fetched.reason == Reason.OK:
            return cls(fetched.data.decode("utf-8", "replace"))
        if 400 <= fetched.status < 500 and fetched.status != TOO_MANY_REQUESTS and fetched.reason != Reason.BLOCKED:
            return cls()
        if fetched.reason == Reason.HTTP_ERROR:
            return cls("", Reason.DISALLOWED, f"robots.txt cannot be read, so nothing may be fetched: {fetched.error}")
        return cls("", fetched.reason, fetched.error)


class Rules:
    """A host's robots.txt as it applies to one user agent."""

    def __init__(self, file: RobotsFile, user_agent: str) -> None:
        self._file, self._name = file, product(user_agent)
        self._parsed = Protego.parse(file.text)
        rate = self._parsed.request_rate(self._name)
        delays = [self._parsed.crawl_delay(self._name) or 0.0, rate.seconds / rate.requests if rate else 0.0]
        self.delay_s = max(delays)  # between two requests

    def judge(self, url: str) -> None:
        """Raises Ended for a URL that must not be fetched."""
        if self._file.reason != Reason.OK:
            raise Ended(self._file.reason, self._file.error)
        if self.delay_s > MAX_DELAY_S:
            raise Ended(Reason.DISALLOWED, f"robots.txt asks for {self.delay_s:g} s between requests, more than {MAX_DELAY_S:g}")
        if not self._parsed.can_fetch(url, self._name):
            raise Ended(Reason.DISALLOWED, f"robots.txt disallows it to {self._name}")


def product(user_agent: str) -> str:
    """The product token, `momalisa` of `momalisa/0.1 (...)`: the name that robots.txt may address."""
    found = re.match(r"[A-Za-z_-]+", user_agent)
    return found[0] if found else user_agent


def forbidden_by(tags: Iterable[str], user_agent: str) -> str:
    """The directive of some X-Robots-Tag headers that forbids learning from a picture; "" if none does.

    `noai, noindex` is said to all robots, `somebot: noai, noindex` to one, up to the next name in the same header.
    """
    for tag in tags:
        ours = True
        for part in tag.split(","):
            said = part.strip().lower()
            if (found := ADDRESSED.fullmatch(said)) and found[1] not in WITH_VALUES:
                ours, said = product(found[1]) == product(user_agent).lower(), found[2].strip()
            if ours and said in NO_AI:
                return said
    return ""
