"""What a run has learned about hosts: who has said no, and what their robots.txt files say."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from yarl import URL

from momalisa.collect.robots import RobotsFile

ROBOTS_LIFETIME_S = 24 * 3600.0  # RFC 9309, section 2.4


def origin_of(text: str) -> str:
    """`https://museum.example` of a URL; "" of what has none."""
    with suppress(ValueError):
        return str(URL(text).origin())
    return ""


@dataclass
class Hosts:
    """What is known: it goes to a worker with a block, and comes back with what the worker has learned."""

    blocked: set[str] = field(default_factory=set)  # names of hosts that answer with a challenge page
    robots: dict[str, RobotsFile] = field(default_factory=dict)  # origin -> its robots.txt

    def copy(self) -> Hosts:
        return Hosts(set(self.blocked), dict(self.robots))


class HostBook:
    """What all workers of a run have learned together, so that a host is asked for its robots.txt once.

    A block waits while another one is learning about a host that it needs too: see `may_begin`.
    """

    def __init__(self) -> None:
        self.known = Hosts()
        self._read_at: dict[str, float] = {}
        self._learning: set[str] = set()

    def may_begin(self, origins: set[str]) -> bool:
        """Whether no running block is learning about a host of this one."""
        return not (origins & self._learning)

    def begin(self, origins: set[str]) -> Hosts:
        """What a worker needs to know for these hosts."""
        self._forget()
        self._learning |= origins - self.known.robots.keys()
        return Hosts(set(self.known.blocked), {o: self.known.robots[o] for o in sorted(origins & self.known.robots.keys())})

    def finish(self, origins: Iterable[str], learned: Hosts) -> None:
        self._learning -= set(origins)
        self.known.blocked |= learned.blocked
        for origin in learned.robots.keys() - self.known.robots.keys():
            self.known.robots[origin] = learned.robots[origin]
            self._read_at[origin] = time.monotonic()

    def _forget(self) -> None:
        old = [origin for origin, read_at in self._read_at.items() if time.monotonic() - read_at > ROBOTS_LIFETIME_S]
        for origin in old:
            del self._read_at[origin], self.known.robots[origin]
