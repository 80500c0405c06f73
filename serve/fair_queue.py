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
class QueueItem:
    """One picture's item in line."""

    key: str
    rows: int
    steps: int
    kiosk: bool = False

    @property
    def row_steps(self) -> int:
        return self.rows * self.steps


P = TypeVar("P", bound=QueueItem)


@dataclass
class Lane(Generic[P]):
    """Keys taking turns by virtual time."""

    now: float = 0.0
    clocks: dict[str, float] = field(default_factory=dict)
    queues: dict[str, deque[P]] = field(default_factory=dict)

    def add(self, item: P) -> None:
        if item.key not in self.queues:
            self.queues[item.key] = deque()
            self.clocks[item.key] = max(self.now, self.clocks.get(item.key, 0.0))
        self.queues[item.key].append(item)

    def head(self) -> P | None:
        if not self.queues:
            return None
        return self.queues[min(self.queues, key=lambda key: self.clocks[key])][0]

    def pop(self) -> P:
        """The head; its key's clock pays for it."""
        item = self.head()
        assert item is not None
        self.now = self.clocks[item.key]
        self.clocks[item.key] += item.row_steps
        self.remove(item)
        return item

    def remove(self, item: P) -> None:
        """Leave without paying. Raises ValueError for one that is not here."""
        queue = self.queues[item.key]
        queue.remove(item)
        if not queue:
            del self.queues[item.key]
        self.clocks = {key: clock for key, clock in self.clocks.items() if key in self.queues or clock > self.now}

    def order(self) -> Iterator[P]:
        """Everybody, as they would be taken if nobody else came."""
        rank = {key: number for number, key in enumerate(self.queues)}
        heap = [(self.clocks[key], rank[key], iter(queue)) for key, queue in self.queues.items()]
        heapq.heapify(heap)
        while heap:
            clock, number, items = heapq.heappop(heap)
            if (item := next(items, None)) is not None:
                yield item
                heapq.heappush(heap, (clock + item.row_steps, number, items))


class FairQueue(Generic[P]):
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

    def __contains__(self, item: object) -> bool:
        return item in self._members

    @property
    def rows(self) -> int:
        return sum(self.rows_by_key.values())

    def excess(self, key: str, rows: int, kiosk: bool = False) -> int:
        """How many rows too many there would be with `rows` more of this key; 0 or less: they may come."""
        own = self.rows_by_key.get(key, 0) + rows - self.max_rows_per_key
        return own if kiosk else max(own, self.rows + rows - self.max_rows)

    def add(self, item: P) -> None:
        """The caller has asked `excess`."""
        (self._kiosk if item.kiosk else self._visitors).add(item)
        self._members.add(item)
        self.rows_by_key[item.key] = self.rows_by_key.get(item.key, 0) + item.rows
        self.row_steps += item.row_steps

    def take(self, free_rows: int) -> P | None:
        """The next picture if it fits into the free rows. A large one is waited for: small ones never pass it by."""
        lane = self._next_lane(self._run, self._kiosk.head(), self._visitors.head())
        item = lane.head()
        if item is None or item.rows > free_rows:
            return None
        lane.pop()
        self._run = self._run + 1 if item.kiosk else 0
        self._forget(item)
        return item

    def remove(self, item: P) -> None:
        """Leave the line; who is not in it has left already."""
        if item in self._members:
            (self._kiosk if item.kiosk else self._visitors).remove(item)
            self._forget(item)

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

    def _forget(self, item: P) -> None:
        self._members.discard(item)
        self.row_steps -= item.row_steps
        self.rows_by_key[item.key] -= item.rows
        if not self.rows_by_key[item.key]:
            del self.rows_by_key[item.key]
