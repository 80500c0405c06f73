"""What a run has learned about hosts: who has said no, and what their robots.txt files say."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field

from yarl import URL

from momalisa.collect.robots import RobotsFile
from momalisa.records import Reason

ROBOTS_LIFETIME_S = 24 * 3600.0  # RFC 9309, section 2.4
UNREACHABLE_LIFETIME_S = 300.0  # of "it cannot be read": a host may come back while the run goes on


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
        self._met: set[str] = set()  # some block is through with them, whether there was something to learn or not

    def may_begin(self, origins: set[str]) -> bool:
        """Whether no running block is learning about a host of this one."""
        return not (origins & self._learning)

    def begin(self, origins: set[str]) -> Hosts:
        """What a worker needs to know for these hosts."""
        self._forget()
        self._learning |= origins - self._met
        return Hosts(set(self.known.blocked), {o: self.known.robots[o] for o in sorted(origins & self.known.robots.keys())})

    def finish(self, origins: set[str], learned: Hosts) -> None:
        """A block is through; `learned` is what its worker knows now."""
        self._learning -= origins
        self._met |= origins
        self.known.blocked |= learned.blocked
        for origin in learned.robots.keys() - self.known.robots.keys():
            self.known.robots[origin] = learned.robots[origin]
            self._read_at[origin] = time.monotonic()

    def _forget(self) -> None:
        for origin, read_at in list(self._read_at.items()):
            lifetime_s = ROBOTS_LIFETIME_S if self.known.robots[origin].reason == Reason.OK else UNREACHABLE_LIFETIME_S
            if time.monotonic() - read_at > lifetime_s:
                del self._read_at[origin], self.known.robots[origin]
                self._met.discard(origin)
