"""The line in front of a generator: bounded in rows, fair among API keys, with a lane for the kiosk.

Fairness is weighted fair queueing by virtual time (self-clocked, Golestani 1994): every key has a clock that advances by
the row-steps of each of its pictures; the next picture is the one whose key's clock is furthest behind, and a key that
was away starts at the present. So two keys that both have work waiting never differ by more than one picture of each
in the work they were given. The kiosk goes first, but of every `KIOSK_RUN + 1` pictures one is somebody else's.

Plain data of one thread: whoever shares a line locks it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

KIOSK_RUN = 3


@dataclass(eq=False)
class Place:
    """One picture's place in line."""

    key: str
    rows: int
    steps: int
    kiosk: bool = False

    @property
    def row_steps(self) -> int:
        return self.rows * self.steps


P = TypeVar("P", bound=Place)


@dataclass
class Lane(Generic[P]):
    """Keys taking turns by virtual time."""

    now: float = 0.0
    clocks: dict[str, float] = field(default_factory=dict)
    queues: dict[str, deque[P]] = field(default_factory=dict)

    def add(self, place: P) -> None:
        if place.key not in self.queues:
            self.queues[place.key] = deque()
            self.clocks[place.key] = max(self.now, self.clocks.get(place.key, 0.0))
        self.queues[place.key].append(place)

    def head(self) -> P | None:
        if not self.queues:
            return None
        return self.queues[min(self.queues, key=lambda key: self.clocks[key])][0]

    def pop(self) -> P:
        """The head; its key's clock pays for it."""
        place = self.head()
        assert place is not None
        self.now = self.clocks[place.key]
        self.clocks[place.key] += place.row_steps
        self.remove(place)
        return place

    def remove(self, place: P) -> None:
        """Leave without paying. Raises ValueError for one that is not here."""
        queue = self.queues[place.key]
        queue.remove(place)
        if not queue:
            del self.queues[place.key]
        self.clocks = {key: clock for key, clock in self.clocks.items() if key in self.queues or clock > self.now}

    def order(self) -> Iterator[P]:
        """Everybody, as they would be taken if nobody else came."""
        rank = {key: number for number, key in enumerate(self.queues)}
        heap = [(self.clocks[key], rank[key], iter(queue)) for key, queue in self.queues.items()]
        heapq.heapify(heap)
        while heap:
            clock, number, places = heapq.heappop(heap)
            if (place := next(places, None)) is not None:
                yield place
                heapq.heappush(heap, (clock + place.row_steps, number, places))


class Line(Generic[P]):
    """Bounded by `max_rows`, and `max_rows_per_key` for each key; the kiosk has its own bound of a key."""

    def __init__(self, max_rows: int, max_rows_per_key: int) -> None:
        self.max_rows, self.max_rows_per_key = max_rows, max_rows_per_key
        self.rows_by_key: dict[str, int] = {}
        self.row_steps = 0
        self._visitors, self._kiosk = Lane[P](), Lane[P]()
        self._run = 0  # kiosk pictures taken since somebody else's
        self._members: set[P] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, place: object) -> bool:
        return place in self._members

    @property
    def rows(self) -> int:
        return sum(self.rows_by_key.values())

    def excess(self, key: str, rows: int, kiosk: bool = False) -> int:
        """How many rows too many there would be with `rows` more of this key; 0 or less: they may come."""
        own = self.rows_by_key.get(key, 0) + rows - self.max_rows_per_key
        return own if kiosk else max(own, self.rows + rows - self.max_rows)

    def add(self, place: P) -> None:
        """The caller has asked `excess`."""
        (self._kiosk if place.kiosk else self._visitors).add(place)
        self._members.add(place)
        self.rows_by_key[place.key] = self.rows_by_key.get(place.key, 0) + place.rows
        self.row_steps += place.row_steps

    def take(self, free_rows: int) -> P | None:
        """The next picture if it fits into the free rows. A large one is waited for: small ones never pass it by."""
        lane = self._next_lane(self._run, self._kiosk.head(), self._visitors.head())
        place = lane.head()
        if place is None or place.rows > free_rows:
            return None
        lane.pop()
        self._run = self._run + 1 if place.kiosk else 0
        self._forget(place)
        return place

    def remove(self, place: P) -> None:
        """Leave the line; who is not in it has left already."""
        if place in self._members:
            (self._kiosk if place.kiosk else self._visitors).remove(place)
            self._forget(place)

    def order(self) -> list[P]:
        """Everybody, as they would be taken if nobody else came."""
        lanes = {True: deque(self._kiosk.order()), False: deque(self._visitors.order())}
        order, run = [], self._run
        while lanes[True] or lanes[False]:
            kiosk = bool(lanes[True]) and (run < KIOSK_RUN or not lanes[False])
            order.append(lanes[kiosk].popleft())
            run = run + 1 if kiosk else 0
        return order

    def _next_lane(self, run: int, kiosk: P | None, visitor: P | None) -> Lane[P]:
        return self._kiosk if kiosk is not None and (run < KIOSK_RUN or visitor is None) else self._visitors

    def _forget(self, place: P) -> None:
        self._members.discard(place)
        self.row_steps -= place.row_steps
        self.rows_by_key[place.key] -= place.rows
        if not self.rows_by_key[place.key]:
            del self.rows_by_key[place.key]
