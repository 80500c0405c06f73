"""One painting thread, the engines it ticks, and the line it takes pictures from.

    paint() in the event loop -> line -> [thread: seat, tick, seat, tick, ...] -> finishers (PNG, checks) -> mailbox

Only the thread calls an engine. Between two ticks it takes away who has left or is late, and seats who is next as
rows are free: nobody waits longer than a tick for either. A new checkpoint's engine is hung beside the old one, gets
its share while it is on trial, and then everything; the old one is ticked until its last picture is done.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from momalisa.config import Serve
from momalisa.engine import Broken, Done, Preview
from momalisa.engine.events import Event as EngineEvent
from serve.easel import Easel
from serve.line import Line, Place
from serve.mailbox import Mailbox
from serve.meters import Meters
from serve.pace import Pace
from serve.trial import Trial
from serve.work import Busy, Commission, Event, Failed, Outcome, Painted, Picture, Progress, State, Waiting

logger = logging.getLogger(__name__)

NEWS_S = 0.5  # how often places in line are told
MAX_TICKS = 1000  # of a trace


@dataclass(eq=False)
class Ticket:
    """One commission from its acceptance to its outcome. Changed under the studio's lock."""

    commission: Commission
    mailbox: Mailbox
    entered_at: float
    seats: list[Seat] = field(default_factory=list)  # those that are not done
    easel: Easel | None = None
    closed: bool = False
    previewed: bool = False
    ticks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def late_at(self) -> float:
        return self.entered_at + self.commission.deadline_s


@dataclass(eq=False)
class Seat(Place):
    """One picture of a ticket: in line, at an easel, or being finished."""

    ticket: Ticket = field(kw_only=True)
    index: int = field(kw_only=True)
    easel: Easel | None = None
    id: int = -1  # the engine's
    seated_at: float = 0.0


class Studio:
    """Submit from event loops; `clock` in seconds."""

    def __init__(self, easel: Easel, limits: Serve, meters: Meters, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._meters, self._clock = limits, meters, clock
        self._main = easel
        self._new: Easel | None = None
        self._trial: Trial | None = None
        self._retiring: list[Easel] = []
        self._line: Line[Seat] = Line(limits.max_waiting_rows, limits.max_waiting_rows_per_key)
        self._pace = Pace()
        self._again: deque[Seat] = deque()  # taken from an easel that failed its trial
        self._tickets: set[Ticket] = set()
        self._leaving: list[Seat] = []
        self._finishing = 0
        self._told_at = -math.inf
        self._broken: BaseException | None = None
        self._closing = False
        self._wake = threading.Condition()
        self.on_rejected: Callable[[Easel, str], None] = lambda easel, problem: None
        self._finishers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="finish")
        self._thread = threading.Thread(target=self._run, name="paint", daemon=True)
        self._thread.start()

    # ---- from the event loop

    async def paint(self, commission: Commission) -> AsyncGenerator[Event, None]:
        """Busy, or events up to an outcome. Closing the generator gives the rows back."""
        ticket = Ticket(commission, Mailbox(), self._clock())
        if refusal := self._enter(ticket):
            yield refusal
            return
        try:
            async with aclosing(ticket.mailbox.events()) as events:
                async for event in events:
                    yield event
        finally:
            self._leave(ticket)

    def state(self) -> State:
        """Raises RuntimeError where the painting thread has ended."""
        if self._broken is not None:
            raise RuntimeError("the painting thread has ended") from self._broken
        with self._wake:
            trial = self._new.checkpoint if self._new else ""
            return State(self._main.checkpoint, trial=trial, waiting=len(self._line))

    def load(self) -> dict[str, float]:
        """Work that is accepted and not done, in row-steps and in seconds."""
        with self._wake:
            row_steps = float(self._pending_row_steps())
            return {"pending_row_steps": row_steps, "pending_s": self._pace.eta_s(row_steps)}

    def hang(self, easel: Easel) -> None:
        """Give requests to a new checkpoint: a share of them first, where a trial is set."""
        with self._wake:
            if self._trial is not None:
                self._trial.fail("replaced by a newer one")
                self._end_trial()
            self._new = easel
            share = self._limits.canary_share if self._limits.canary_s else 0.0
            self._trial = Trial(share, self._clock() + self._limits.canary_s)
            self._wake.notify()

    def withdraw(self, problem: str) -> None:
        """End a trial that is going on: everything goes to the old checkpoint again."""
        with self._wake:
            if self._trial is not None:
                self._trial.fail(problem)
                self._wake.notify()

    def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        for easel in self._easels():
            easel.engine.close()
        self._finishers.shutdown()

    def _enter(self, ticket: Ticket) -> Outcome | None:
        asked, rows = ticket.commission, ticket.commission.rows
        with self._wake:
            if self._closing or self._broken is not None:
                return Failed("this generator is closing; try again", retry=True)
            if (excess := self._line.excess(asked.key, rows * len(asked.seeds), asked.kiosk)) > 0:
                self._meters.refused.labels("line_full").inc()
                mean_steps = self._line.row_steps / max(1, self._line.rows)
                return Busy(self._pace.retry_after_s(excess * mean_steps), f"{len(self._line)} pictures are waiting already")
            seats = [Seat(asked.key, rows, asked.steps, asked.kiosk, ticket=ticket, index=n) for n in range(len(asked.seeds))]
            for seat in seats:
                self._line.add(seat)
            ticket.seats = list(seats)
            place = self._places()[ticket]
            if place.eta_s > asked.deadline_s:
                for seat in seats:
                    self._line.remove(seat)
                self._meters.refused.labels("deadline").inc()
                wait = self._pace.retry_after_s((place.eta_s - asked.deadline_s) / self._pace.row_step_s)
                return Busy(wait, f"it would take about {place.eta_s:.0f} s, and deadline_s is {asked.deadline_s:.0f}")
            self._tickets.add(ticket)
            ticket.mailbox.post(place)
            self._wake.notify()
        return None

    def _leave(self, ticket: Ticket) -> None:
        with self._wake:
            if not ticket.closed:
                self._meters.outcomes.labels("left").inc()
                self._close(ticket)
            self._wake.notify()

    # ---- under the lock

    def _easels(self) -> list[Easel]:
        return [easel for easel in (self._main, self._new, *self._retiring) if easel is not None]

    def _pending_row_steps(self) -> int:
        again = sum(seat.row_steps for seat in self._again)
        return self._line.row_steps + again + self._at_work()

    def _at_work(self) -> int:
        return sum(easel.pending_row_steps for easel in self._easels())

    def _places(self) -> dict[Ticket, Waiting]:
        """Where everybody is, and when their last picture will be done."""
        work = self._at_work()
        at_work = self._pace.eta_s(work)
        places = {seat.ticket: Waiting(0, round(at_work, 1)) for easel in self._easels() for seat in easel.seats.values()}
        before, positions = 0, dict[Ticket, int]()
        for seat in [*self._again, *self._line.order()]:
            work += seat.row_steps
            if seat.ticket not in places:
                before += 1
                positions[seat.ticket] = before
            places[seat.ticket] = Waiting(positions.get(seat.ticket, 0), round(self._pace.eta_s(work), 1))
        return places

    def _close(self, ticket: Ticket, outcome: Outcome | None = None) -> None:
        """Nothing more comes for a ticket: its seats are given back."""
        ticket.closed = True
        self._tickets.discard(ticket)
        for seat in ticket.seats:
            self._line.remove(seat)
        self._again = deque(seat for seat in self._again if seat.ticket is not ticket)
        self._leaving += [seat for seat in ticket.seats if seat.easel is not None]
        ticket.seats = []
        if outcome is not None:
            ticket.mailbox.post(outcome)
            self._meters.outcomes.labels("painted" if isinstance(outcome, Painted) else "failed").inc()

    # ---- in the painting thread

    def _run(self) -> None:
        try:
            while self._prepare():
                for easel in self._easels():
                    self._tick(easel)
        except BaseException as error:
            logger.exception("the painting thread ends")
            with self._wake:
                self._broken = error
                for ticket in list(self._tickets):
                    self._close(ticket, Failed("the generator failed; try again", retry=True))

    def _prepare(self) -> bool:
        """Everything between two ticks; waits where there is nothing to do. False: closed and done."""
        with self._wake:
            while True:
                self._dismiss()
                self._judge()
                self._seat()
                self._tell()
                if any(easel.seats for easel in self._easels()):
                    return True
                if self._closing and not self._tickets:
                    return False
                self._wake.wait(0.05 if self._tickets or self._trial else 1.0)

    def _dismiss(self) -> None:
        """Who has left, and who is late."""
        now = self._clock()
        for ticket in [ticket for ticket in self._tickets if now > ticket.late_at]:
            seconds = f"{ticket.commission.deadline_s:.0f}"
            self._close(ticket, Failed(f"not painted within {seconds} s; try again when there are fewer visitors", late=True))
        for seat in self._leaving:
            if seat.easel is not None and seat.easel.seats.pop(seat.id, None) is not None:
                seat.easel.engine.cancel(seat.id)
                seat.easel.count()
        self._leaving.clear()
        for easel in [easel for easel in self._retiring if not easel.seats]:
            self._retiring.remove(easel)
            easel.engine.close()
            logger.info("%s is taken down", easel.checkpoint)

    def _judge(self) -> None:
        trial = self._trial
        if trial is not None and (trial.problem or trial.passed(self._clock())):
            self._end_trial()

    def _end_trial(self) -> None:
        """The new checkpoint gets everything, or nothing: then its pictures are painted again with the old one."""
        trial, new = self._trial, self._new
        assert trial is not None
        assert new is not None
        self._trial = self._new = None
        if not trial.problem:
            logger.info("%s takes over from %s", new.checkpoint, self._main.checkpoint)
            self._retiring.append(self._main)
            self._main = new
            return
        logger.error("%s is given up: %s", new.checkpoint, trial.problem)
        self._meters.rollbacks.inc()
        for seat in list(new.seats.values()):
            self._once_more(seat)
        self._retiring.append(new)  # its engine is told to cancel by the thread, in `_dismiss`
        self._leaving += list(new.seats.values())
        self.on_rejected(new, trial.problem)

    def _once_more(self, seat: Seat) -> None:
        ticket = seat.ticket
        if seat not in ticket.seats:
            return  # it has left, or is being painted again already
        ticket.easel = self._main
        again = Seat(seat.key, seat.rows, seat.steps, seat.kiosk, ticket=ticket, index=seat.index)
        ticket.seats = [again if other is seat else other for other in ticket.seats]
        self._again.append(again)

    def _seat(self) -> None:
        """Give free rows to who is next, unless finished pictures pile up."""
        free = self._limits.max_rows - sum(seat.rows for easel in self._easels() for seat in easel.seats.values())
        while free > 0 and self._finishing < 2 * self._limits.max_rows:
            if self._again:
                seat: Seat | None = self._again.popleft()
            else:
                seat = self._line.take(free)
            if seat is None:
                return
            ticket = seat.ticket
            if ticket.easel is None:
                new = self._new if self._trial is not None and self._trial.next_is_new() else None
                ticket.easel = new or self._main
            seat.easel = ticket.easel if ticket.easel in self._easels() else self._main
            try:
                seat.id = seat.easel.submit(ticket.commission, seat.index)
            except ValueError as error:
                seat.easel = None
                self._close(ticket, Failed(str(error), wrong=True))
                continue
            seat.seated_at = self._clock()
            seat.easel.seats[seat.id] = seat
            seat.easel.count()
            free -= seat.rows

    def _tell(self) -> None:
        now = self._clock()
        if now - self._told_at < NEWS_S:
            return
        self._told_at = now
        for ticket, place in self._places().items():
            ticket.mailbox.post(place)
        self._meters.waiting.set(len(self._line))
        self._meters.pending_row_steps.set(self._pending_row_steps())
        self._meters.served(self._main.checkpoint, self._new.checkpoint if self._new else "")

    def _tick(self, easel: Easel) -> None:
        if not easel.seats:
            return
        before, started = easel.engine.pending_row_steps, self._clock()
        events = easel.engine.tick()
        seconds = self._clock() - started
        rows = before - easel.engine.pending_row_steps  # of the UNet's batch; none where pictures were only decoded
        self._pace.tick(seconds, rows)
        self._meters.tick_s.observe(seconds)
        self._meters.tick_rows.observe(rows)
        with self._wake:
            easel.count()
            for ticket in {seat.ticket for seat in easel.seats.values() if seat.ticket.commission.trace}:
                if len(ticket.ticks) < MAX_TICKS:
                    ticket.ticks.append(
                        {
                            "at_s": round(started - ticket.entered_at, 4),
                            "seconds": round(seconds, 4),
                            "rows": rows,
                            "checkpoint": easel.checkpoint,
                        }
                    )
            for event in events:
                self._handle(easel, event)

    def _handle(self, easel: Easel, event: EngineEvent) -> None:
        seat = easel.seats.get(event.id) if isinstance(event, Preview) else easel.seats.pop(event.id, None)
        if seat is None:
            return  # it has left
        if isinstance(event, Broken):
            self._spoilt(seat, easel, str(event.error))
        else:
            self._finishing += 1
            self._finishers.submit(self._finish, seat, easel, event)

    def _spoilt(self, seat: Seat, easel: Easel, problem: str) -> None:
        """No picture came. Under trial it is painted again by the old checkpoint; else the visitor is told."""
        if easel is not self._main:
            self._once_more(seat)
            if easel is self._new and self._trial is not None and seat.ticket.commission.adapter is None:
                self._trial.fail(problem)
            return
        logger.error("a picture failed: %s", problem)
        if not seat.ticket.closed:
            self._close(seat.ticket, Failed("the picture could not be painted: the server's log says why"))

    # ---- in a finisher's thread

    def _finish(self, seat: Seat, easel: Easel, event: Preview | Done) -> None:
        ticket = seat.ticket
        try:
            if isinstance(event, Preview):
                self._preview(ticket, seat, easel, event)
                return
            png, filtered = easel.finish(ticket.commission, seat.index, event.picture)
        except Exception as error:
            logger.exception("a picture could not be finished")
            with self._wake:
                self._spoilt(seat, easel, f"{type(error).__name__}: {error}")
        else:
            self._deliver(seat, easel, Picture(seat.index, png, easel.checkpoint, filtered))
        finally:
            with self._wake:
                self._finishing -= 1
                self._wake.notify()

    def _preview(self, ticket: Ticket, seat: Seat, easel: Easel, event: Preview) -> None:
        ticket.mailbox.post(Progress(seat.index, event.done, event.total, easel.preview(event.picture)))
        if not ticket.previewed:
            ticket.previewed = True
            self._meters.first_preview_s.observe(self._clock() - ticket.entered_at)

    def _deliver(self, seat: Seat, easel: Easel, picture: Picture) -> None:
        with self._wake:
            ticket, now = seat.ticket, self._clock()
            if self._trial is not None and easel in (self._new, self._main):
                self._trial.painted(easel is self._new, (now - seat.seated_at) / seat.steps)
            if seat not in ticket.seats:
                return  # it has left, or is being painted again
            self._meters.pictures.inc()
            if picture.filtered:
                self._meters.filtered.labels("picture").inc()
            ticket.mailbox.post(picture)
            ticket.seats.remove(seat)
            if not ticket.seats:
                self._close(ticket, Painted(easel.checkpoint, tuple(ticket.ticks)))
