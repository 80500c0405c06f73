"""One thread that ticks the engines, and between two ticks starts, stops and rolls out.

    generate() in the event loop -> admission -> [thread: start, tick, start, tick, ...] -> finishing threads -> mailbox

Only the thread calls an engine. Between two ticks it takes away who has left or is late, and starts who is next as rows
are free: nobody waits longer than a tick for either. A new checkpoint's engine is ticked beside the old one, gets its
share while it is a canary, and then everything; the old one is ticked until its last picture is done.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from functools import partial

from momalisa.config import Serve
from momalisa.engine import Broken, Preview
from momalisa.engine.events import Event as EngineEvent
from momalisa.storage import StorageError
from serve import checks, finishing, rehearsal
from serve.admission import Admission
from serve.canary import ENOUGH_PICTURES, Canary
from serve.loaded_checkpoint import LoadedCheckpoint, requests_of
from serve.mailbox import Mailbox
from serve.meters import Meters
from serve.rollout import Rollout
from serve.sample import ActiveTask, Sample
from serve.task import Completed, Event, Failed, GenerationTask, Outcome, Picture, Progress, State, Waiting

logger = logging.getLogger(__name__)

NEWS_S = 0.5  # how often places in line are told
HUNG_S = 120.0  # a tick that lasts longer has hung, unless requests may take very long


class Scheduler:
    """Ask from event loops; `clock` in seconds."""

    def __init__(
        self,
        main: LoadedCheckpoint,
        limits: Serve,
        meters: Meters,
        challenger: LoadedCheckpoint | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._meters, self._clock = limits, meters, clock
        self._rollout, self._admission = Rollout(main, challenger), Admission(limits, meters)
        self._active: set[ActiveTask] = set()
        self._leaving: list[Sample] = []
        self._finishing = 0
        self._told_at = -math.inf
        self._broken: BaseException | None = None
        self._ticking_since: float | None = None
        self._closing = False
        self._wake = threading.Condition()
        self.on_given_up: Callable[[LoadedCheckpoint, str], None] = lambda checkpoint, problem: None
        self._finishers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="finish")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- from the event loop

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        """Rejected, or events up to an outcome. Closing the generator gives the rows back."""
        entered_at = self._clock()
        requests = requests_of(task) if task.image is None else await asyncio.to_thread(requests_of, task)
        active = ActiveTask(task, requests, Mailbox(), entered_at)
        if refusal := self._enter(active):
            yield refusal
            return
        try:
            async with aclosing(active.mailbox.events()) as events:
                async for event in events:
                    yield event
        finally:
            self._leave(active)

    def state(self) -> State:
        """Raises RuntimeError, as `check_health`."""
        self.check_health()
        with self._wake:
            main, new, challenger = self._rollout.main, self._rollout.new, self._rollout.challenger
            return State(
                main.id,
                trial=new.id if new else "",
                waiting=len(self._admission),
                problem=main.problem,
                challenger=challenger.id if challenger else "",
                picture_check=checks.said(self._limits, main.check),
            )

    def check_health(self) -> None:
        """Raises RuntimeError where nothing is painted any more: the engine's thread has ended, or hangs in a tick."""
        if self._broken is not None:
            raise RuntimeError("the engine's thread has ended") from self._broken
        since, most = self._ticking_since, max(HUNG_S, self._limits.deadline_s / 2)
        if since is not None and self._clock() - since > most:
            raise RuntimeError(f"the engine hangs: a tick has lasted {self._clock() - since:.0f} s, and {most:.0f} s is the most")

    def serving(self) -> tuple[str, str, bool]:
        """The path of the main checkpoint, of the one on trial or an empty string, and whether another is yet to be unloaded."""
        with self._wake:
            main, new = self._rollout.main, self._rollout.new
            return main.path, new.path if new else "", bool(self._rollout.retiring)

    @property
    def unloaded(self) -> int:
        """How many checkpoints have been."""
        return self._rollout.unloaded

    def load(self) -> dict[str, float]:
        """Work that is accepted and not done, in row-steps and in seconds."""
        with self._wake:
            row_steps = float(self._pending_row_steps())
            return {"pending_row_steps": row_steps, "pending_s": self._admission.pace.eta_s(row_steps)}

    def roll_out(self, new: LoadedCheckpoint) -> None:
        """Give tasks to a new checkpoint: a share of them first, where a canary is set. No other is on trial."""
        seconds = self._limits.canary_s
        share, wanted = (self._limits.canary_share, ENOUGH_PICTURES) if seconds else (0.0, 0)
        with self._wake:
            self._rollout.start(new, Canary(share, self._clock() + seconds, wanted))
            self._wake.notify()

    def abort_rollout(self, reason: str) -> None:
        """End a canary that is going on, which is not its failure: everything goes to the old checkpoint again."""
        with self._wake:
            if self._rollout.canary is not None:
                self._rollout.canary.withdraw(reason)
                self._wake.notify()

    def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        for checkpoint in self._rollout.checkpoints():
            checkpoint.engine.close()
        self._finishers.shutdown()

    def _enter(self, active: ActiveTask) -> Outcome | None:
        with self._wake:
            if self._closing or self._broken is not None:
                return Failed("this generator is closing; try again", retry=True)
            answer = self._admission.admit(active, self._at_work())
            if not isinstance(answer, Waiting):
                return answer
            self._active.add(active)
            active.mailbox.post(answer)
            self._wake.notify()
        return None

    def _leave(self, active: ActiveTask) -> None:
        with self._wake:
            if not active.closed:
                self._meters.outcomes.labels("left").inc()
                self._close(active)
            self._wake.notify()

    # ---- under the lock

    def _running(self) -> list[Sample]:
        return [sample for checkpoint in self._rollout.checkpoints() for sample in checkpoint.running.values()]

    def _at_work(self) -> int:
        return sum(checkpoint.pending_row_steps for checkpoint in self._rollout.checkpoints())

    def _pending_row_steps(self) -> int:
        return self._admission.row_steps + self._at_work()

    def _close(self, active: ActiveTask, outcome: Outcome | None = None) -> None:
        """Nothing more comes for a task: its rows and its places in line are given back."""
        active.closed = True
        self._active.discard(active)
        self._admission.remove(active)
        self._leaving += [sample for sample in active.samples if sample.checkpoint is not None]
        active.samples = []
        if outcome is not None:
            active.mailbox.post(outcome)
            self._meters.outcomes.labels("painted" if isinstance(outcome, Completed) else "failed").inc()

    # ---- in the engine's thread

    def _run(self) -> None:
        try:
            while self._prepare():
                self._tick_all()
        except BaseException as error:
            logger.exception("the engine's thread ends")
            with self._wake:
                self._broken = error
                for active in list(self._active):
                    self._close(active, Failed("the generator failed; try again", retry=True))

    def _tick_all(self) -> None:
        """In a frame that ends: one that waits for visitors must not keep a checkpoint that is unloaded meanwhile."""
        for checkpoint in self._rollout.checkpoints():
            self._tick(checkpoint)

    def _prepare(self) -> bool:
        """Everything between two ticks; waits where there is nothing to do. False: closed and done."""
        with self._wake:
            while True:
                if self._rollout.decided(self._clock()):
                    self._end_canary()
                self._dismiss()
                self._start()
                self._tell()
                if self._running():
                    return True
                if self._closing and not self._active:
                    return False
                self._wake.wait(0.05 if self._active or self._rollout.canary else 1.0)

    def _dismiss(self) -> None:
        """Who has left, who is late, and checkpoints that have nothing more to do."""
        now = self._clock()
        for active in [active for active in self._active if now > active.late_at]:
            seconds = f"{active.task.deadline_s:.0f}"
            self._close(active, Failed(f"not painted within {seconds} s; try again when there are fewer visitors", late=True))
        for sample in self._leaving:
            if sample.checkpoint is not None:
                sample.checkpoint.cancel(sample)
        self._leaving.clear()
        self._rollout.retire()

    def _end_canary(self) -> None:
        """The new checkpoint gets everything, or nothing: then its pictures are drawn again with the old one."""
        new, canary = self._rollout.end()
        if canary.problem:
            for sample in new.running.values():
                self._once_more(sample)
            self._leaving += new.running.values()
        if canary.problem and not canary.withdrawn:
            self._meters.rollbacks.inc()
            self.on_given_up(new, canary.problem)

    def _once_more(self, sample: Sample) -> None:
        if sample in sample.active.samples:  # else it has left, or is being drawn again already
            sample.active.checkpoint = self._rollout.main
            self._admission.requeue(sample.again())

    def _start(self) -> None:
        """Give free rows to who is next, unless finished pictures pile up."""
        checkpoints = self._rollout.checkpoints()
        free = self._limits.max_rows - sum(checkpoint.rows for checkpoint in checkpoints)
        free -= self._rehearse(free)
        unfinished = self._finishing + sum(len(checkpoint.decoding) for checkpoint in checkpoints)
        while free > 0 and unfinished < 2 * self._limits.max_rows:
            sample = self._admission.next(free)
            if sample is None:
                return
            try:
                self._rollout.choose(sample).start(sample)
                free -= sample.rows
            except ValueError as error:
                self._close(sample.active, Failed(str(error), wrong=True))

    def _rehearse(self, free: int) -> int:
        """Let the new checkpoint paint for nobody where its trial needs that; how many of the free rows it takes.

        Too few are kept free for it: smaller pictures would else take each one as it comes.
        """
        new, canary, now = self._rollout.new, self._rollout.canary, self._clock()
        idle = not (self._active or self._finishing)
        if self._closing or new is None or canary is None or new.running or not canary.rehearses(idle, now):
            return 0
        sample = rehearsal.sample_of(self._limits, canary.pictures, now)
        if sample.rows > free:
            return free
        try:
            new.start(sample)
        except ValueError as error:
            canary.fail(str(error))
            return 0
        return sample.rows

    def _tell(self) -> None:
        """Everybody their place, now and then."""
        now = self._clock()
        if now - self._told_at < NEWS_S:
            return
        self._told_at = now
        for active, place in self._admission.places(self._running(), self._at_work()).items():
            active.mailbox.post(place)
        self._meters.waiting.set(len(self._admission))
        self._meters.pending_row_steps.set(self._pending_row_steps())
        self._meters.served(self._rollout.main.id, self._rollout.new.id if self._rollout.new else "")

    def _tick(self, checkpoint: LoadedCheckpoint) -> None:
        if not checkpoint.running:
            return
        engine, started = checkpoint.engine, self._clock()
        before, self._ticking_since = engine.pending_row_steps, started
        events = engine.tick()
        seconds, self._ticking_since = self._clock() - started, None
        rows = before - engine.pending_row_steps  # of the UNet's batch; none where pictures were only decoded
        self._admission.pace.tick(seconds, rows)
        self._meters.tick_s.observe(seconds)
        self._meters.tick_rows.observe(rows)
        with self._wake:
            checkpoint.count()
            stepped = [checkpoint.running[id_] for id_ in engine.stepped if id_ in checkpoint.running]
            if not events:  # steps alone: nothing was decoded or shown
                self._rollout.note_tick(checkpoint, stepped, rows, seconds)
            for active in {sample.active for sample in stepped if sample.active.task.trace}:
                active.note_tick(started, seconds, rows, checkpoint.id)
            for event in events:
                self._handle(checkpoint, event)

    def _handle(self, checkpoint: LoadedCheckpoint, event: EngineEvent) -> None:
        running = checkpoint.running
        sample = running.get(event.id) if isinstance(event, Preview) else running.pop(event.id, None)
        if sample is None:
            return  # it has left
        if isinstance(event, Broken):
            self._spoilt(sample, checkpoint, str(event.error), retry=isinstance(event.error, StorageError))
            return
        self._finishing += 1
        future = self._finishers.submit(finishing.finished, sample, checkpoint, event)
        future.add_done_callback(partial(self._finished, sample, checkpoint))

    def _spoilt(self, sample: Sample, checkpoint: LoadedCheckpoint, problem: str, retry: bool = False) -> None:
        """No picture came. Where it is not the main checkpoint's, that one draws it again; else the visitor is told.

        `retry`: it may come soon, as where the store of adapters does not answer.
        """
        request_id = sample.active.task.request_id
        if checkpoint is not self._rollout.main:
            logger.warning("request %s: %s: a picture failed: %s", request_id, checkpoint.id, problem)
            self._once_more(sample)
            if checkpoint is self._rollout.new and sample.active.task.adapter is None:
                self._rollout.fail(problem)
            return
        logger.error("request %s: %s: a picture failed: %s", request_id, checkpoint.id, problem)
        if not sample.active.closed:
            told = f"the picture could not be painted: the server's log says why, at request {request_id or '(no id)'}"
            self._close(sample.active, Failed(told, retry=retry))

    # ---- in a finishing thread

    def _finished(self, sample: Sample, checkpoint: LoadedCheckpoint, future: Future[Picture | Progress]) -> None:
        error = future.exception()
        with self._wake:
            self._finishing -= 1
            if error is not None:
                request_id = sample.active.task.request_id
                logger.error("request %s: a picture could not be finished", request_id, exc_info=error)
                self._spoilt(sample, checkpoint, f"{type(error).__name__}: {error}")
            else:
                self._deliver(sample, checkpoint, future.result())
            self._wake.notify()

    def _deliver(self, sample: Sample, checkpoint: LoadedCheckpoint, made: Picture | Progress) -> None:
        active = sample.active
        if isinstance(made, Progress):
            active.mailbox.post(made)
            if not active.previewed:
                active.previewed = True
                self._meters.first_preview_s.observe(self._clock() - active.entered_at)
            return
        self._rollout.note_picture(checkpoint)
        if sample not in active.samples:
            return  # it has left, or is being drawn again
        logger.info("request %s: %s: picture %d is finished", active.task.request_id, checkpoint.id, made.index)
        self._meters.pictures.inc()
        if made.filtered:
            self._meters.filtered.labels("picture").inc()
        active.mailbox.post(made)
        active.samples.remove(sample)
        if not active.samples:
            self._close(active, Completed(checkpoint.id, tuple(active.ticks)))
