"""Two pictures of the same words and seed, by the present checkpoint and by the challenger, and a visitor's vote on them.

What they are is not told before the vote, and which comes first is chance. A comparison is voted on once, by who asked
for it. It is kept in the memory of the HTTP layer; the vote goes to where promotion reads it (`momalisa.votes`).
"""

from __future__ import annotations

import math
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from serve import answers
from serve.access import Rate
from serve.errors import ApiError
from serve.task import Backend, Ballot, Failed, GenerationTask, Unavailable

Better = Literal["first", "second"]
MAX_CALLERS = 10_000  # whose rates are remembered


def nothing() -> ApiError:
    return ApiError(409, "there is nothing to compare with: one checkpoint is served (serve.challenger)", code="no_challenger")


@dataclass(frozen=True)
class Comparison:
    """`checkpoints`: as the pictures were shown."""

    id: str
    owner: str
    task: GenerationTask
    checkpoints: tuple[str, str]
    shown_at: float

    def ballot(self, better: Better) -> Ballot:
        winner, loser = self.checkpoints if better == "first" else self.checkpoints[::-1]
        about = {"seed": self.task.seeds[0], "steps": self.task.steps, "guidance_scale": self.task.guidance_scale}
        return Ballot(winner, loser, about)


class Comparisons:
    """Those that were shown and not voted on: at most `max_open`, the oldest go first, none longer than `keep_s`."""

    def __init__(
        self, backend: Backend, max_open: int, keep_s: float, votes_per_minute: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backend, self._max_open, self._keep_s, self._clock = backend, max_open, keep_s, clock
        self._open: dict[str, Comparison] = {}
        self._votes_per_minute = votes_per_minute
        self._rates: dict[str, Rate] = {}

    async def show(self, task: GenerationTask) -> dict[str, Any]:
        """Both pictures. Raises ApiError: 409 where there is no second checkpoint, and whatever a picture may."""
        pictures, _ = await answers.collect(self._backend, task)
        if withheld := [picture for picture in pictures if picture.png is None]:
            raise answers.filtered(withheld[0].filtered)
        if pictures[0].checkpoint == pictures[1].checkpoint:
            raise nothing()
        random.SystemRandom().shuffle(pictures)
        checkpoints = (pictures[0].checkpoint, pictures[1].checkpoint)
        made = Comparison(f"cmp_{uuid.uuid4().hex}", task.key, task, checkpoints, self._clock())
        self._open[made.id] = made
        self._forget()
        return {
            "id": made.id,
            "object": "image.comparison",
            "created": int(time.time()),
            "revised_prompt": task.prompt,
            "seed": task.seeds[0],
            "data": [{"b64_json": answers.encoded(picture.png or b"")} for picture in pictures],
        }

    async def vote(self, id_: str, owner: str, better: Better) -> Ballot:
        """Cast. Raises ApiError: 404 for what cannot be voted on (any more), 429 above the caller's rate, 503."""
        self._forget()
        comparison = self._open.get(id_)
        if comparison is None or comparison.owner != owner:
            message = f"there is no comparison {id_[:60]!r} of yours to vote on; one vote each, within {self._keep_s:.0f} s"
            raise ApiError(404, message, code="comparison_not_found")
        self._slow_down(owner)
        del self._open[id_]  # before anything is waited for: two votes at once are one
        ballot = comparison.ballot(better)
        try:
            await self._backend.vote(ballot)
        except Unavailable as error:
            self._open[id_] = comparison
            raise answers.failure(Failed(str(error), retry=True)) from None
        return ballot

    def _slow_down(self, owner: str) -> None:
        rate = self._rates.setdefault(owner, Rate(self._votes_per_minute, self._clock()))
        while len(self._rates) > MAX_CALLERS:
            del self._rates[next(iter(self._rates))]
        if early := rate.take(self._clock()):
            message = f"{self._votes_per_minute} votes a minute are taken of one visitor"
            raise ApiError(429, message, None, "rate_limit_exceeded", "rate_limit_error", math.ceil(early))

    def _forget(self) -> None:
        old = self._clock() - self._keep_s
        for one in list(self._open.values()):
            if len(self._open) <= self._max_open and one.shown_at > old:
                return
            del self._open[one.id]
