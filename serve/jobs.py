"""Tasks that outlive a connection: asked for, looked after and fetched later, for proxies that cut long requests.

They are kept in the memory of the HTTP layer (run one of it): at most `max_jobs`, finished ones of at most `max_bytes` together
and for at most `keep_s`. Where there is no room, of who has most those that finished first go first; who asks for one that is
gone is told so.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from serve import answers
from serve.errors import ApiError
from serve.task import Backend, Completed, Event, Failed, GenerationTask, Outcome, Picture, Progress, Rejected, Waiting
from serve.turns import MAX_S

CANCELLED = Failed("the job was cancelled")
MAX_GONE = 10_000  # ids that are remembered of jobs that are not


@dataclass(eq=False)
class Job:
    """`events` holds the newest of each kind, with a number that grows: what a late reader still has to see."""

    id: str
    owner: str
    task: GenerationTask
    created: int
    events: dict[tuple[str, int], tuple[int, Event]] = field(default_factory=dict)
    outcome: Outcome | None = None
    ended_at: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    runner: asyncio.Task[None] | None = None
    _count: int = 0

    def put(self, event: Event) -> None:
        self._count += 1
        kind = (type(event).__name__, event.index if isinstance(event, Progress | Picture) else 0)
        self.events.pop(kind, None)
        self.events[kind] = (self._count, event)
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def bytes(self) -> int:
        """What it keeps: its pictures, and those that were sent."""
        made = sum(len(event.png or b"") for _, event in self.events.values() if isinstance(event, Picture))
        return made + len(self.task.image or b"") + len(self.task.mask or b"")

    @property
    def status(self) -> str:
        if self.outcome is None:
            waiting = self.newest(Waiting)
            return "queued" if waiting and waiting.position > 0 else "running"
        if isinstance(self.outcome, Completed):
            return "completed"
        return "cancelled" if self.outcome is CANCELLED else "failed"

    def newest(self, kind: type[Waiting]) -> Waiting | None:
        found = self.events.get((kind.__name__, 0))
        return found[1] if found and isinstance(found[1], kind) else None

    def body(self) -> dict[str, Any]:
        """The job as the API shows it."""
        shown: dict[str, Any] = {"id": self.id, "object": "image.job", "created": self.created, "status": self.status}
        waiting = self.newest(Waiting)
        if self.outcome is None and waiting is not None:
            shown |= {"position": waiting.position, "eta_s": waiting.eta_s}
        if isinstance(self.outcome, Completed):
            pictures = [event for _, event in self.events.values() if isinstance(event, Picture)]
            pictures.sort(key=lambda picture: picture.index)
            try:
                shown["result"] = answers.body(self.task, pictures, self.outcome)
            except ApiError as error:
                shown |= {"status": "failed", **error.body()}
        elif isinstance(self.outcome, Rejected | Failed) and self.outcome is not CANCELLED:
            shown |= answers.failure(self.outcome).body()
        return shown

    async def follow(self) -> AsyncGenerator[Event, None]:
        """What has come, then what comes, up to the outcome."""
        seen = 0
        while True:
            changed = self.changed
            for number, event in [item for item in self.events.values() if item[0] > seen]:
                seen = number
                yield event
            if self.outcome is not None and seen == self._count:
                return
            if changed is self.changed:
                await changed.wait()


class Jobs:
    """Every job of one HTTP process."""

    def __init__(
        self, backend: Backend, max_jobs: int, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backend, self._clock = backend, clock
        self._max_jobs, self._max_bytes, self._keep_s = max_jobs, max_bytes, keep_s
        self._jobs: dict[str, Job] = {}
        self._finished: dict[str, Job] = {}  # of these, in the order of their ends
        self._finished_bytes = 0
        self._gone: dict[str, str] = {}  # id -> owner, of the newest that were forgotten

    def __len__(self) -> int:
        return len(self._jobs)

    async def start(self, task: GenerationTask) -> Job:
        """A job that is in line. Raises ApiError (429) where there is no room for it."""
        self._forget(self._max_jobs - 1)
        if len(self._jobs) >= self._max_jobs:
            soonest_s = min(place.eta_s if (place := job.newest(Waiting)) else 1.0 for job in self._jobs.values())
            wait_s = max(1, min(MAX_S, math.ceil(soonest_s)))
            raise answers.failure(Rejected(wait_s, f"{self._max_jobs} jobs are under way already"))
        job = Job(f"job_{uuid.uuid4().hex}", task.key, task, int(time.time()))
        self._jobs[job.id] = job
        accepted = job.changed
        job.runner = asyncio.create_task(self._work(job))
        try:
            await accepted.wait()
        except asyncio.CancelledError:
            self.cancel(job)
            raise
        if isinstance(job.outcome, Rejected):
            raise answers.failure(job.outcome)
        return job

    def get(self, id_: str, owner: str) -> Job:
        """Raises ApiError: 404 for a job that is not there, or is somebody else's, and 410 for one that is kept no longer."""
        self._forget(self._max_jobs)
        job = self._jobs.get(id_)
        if job is not None and job.owner == owner:
            return job
        if self._gone.get(id_) == owner:
            message = f"this job has ended and is kept no longer: {self._keep_s:.0f} s at most, less when there are many"
            raise ApiError(410, message, code="job_gone")
        raise ApiError(404, f"there is no job {id_[:60]!r} of yours", code="job_not_found")

    def cancel(self, job: Job) -> None:
        """Give its rows back; one that has ended stays as it is."""
        if job.outcome is None:
            self._end(job, CANCELLED)
            assert job.runner is not None
            job.runner.cancel()

    async def _work(self, job: Job) -> None:
        try:
            async with aclosing(self._backend.generate(job.task)) as events:
                async for event in events:
                    if (outcome := answers.outcome_of(event)) is not None:
                        self._end(job, outcome)
                        return
                    job.put(event)
            self._end(job, Failed("the generator was lost while it painted; try again", retry=True))
        except asyncio.CancelledError:
            if job.outcome is None:
                self._end(job, CANCELLED)
            raise

    def _end(self, job: Job, outcome: Outcome) -> None:
        job.outcome, job.ended_at = outcome, self._clock()
        for kind in [kind for kind, (_, event) in job.events.items() if isinstance(event, Progress | Waiting)]:
            del job.events[kind]
        job.put(outcome)
        if isinstance(outcome, Rejected):
            del self._jobs[job.id]
            return
        self._finished[job.id] = job
        self._finished_bytes += job.bytes
        self._forget(self._max_jobs)

    def _forget(self, most: int) -> None:
        """Those that are too old, and as many of the others as leave `most` jobs and few enough bytes; none under way."""
        now = self._clock()
        for job in [job for job in self._finished.values() if now > job.ended_at + self._keep_s]:
            self._drop(job)
        while self._finished and (len(self._jobs) > most or self._finished_bytes > self._max_bytes):
            self._drop(self._least_missed(by_bytes=len(self._jobs) <= most))
        while len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]

    def _least_missed(self, by_bytes: bool) -> Job:
        """The finished job that ended first, of the owner who has most: bytes of finished jobs, or jobs."""
        held = Counter[str]()
        for job in (self._finished if by_bytes else self._jobs).values():
            held[job.owner] += job.bytes if by_bytes else 1
        return max(self._finished.values(), key=lambda job: held[job.owner])  # the first of equals

    def _drop(self, job: Job) -> None:
        del self._jobs[job.id], self._finished[job.id]
        self._finished_bytes -= job.bytes
        self._gone[job.id] = job.owner
