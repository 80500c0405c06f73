"""What passes between the HTTP layer and a generator: a task one way, events the other way.

Plain data, so that the HTTP layer needs no torch and its tests need no Ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Sampler = Literal["ddim", "euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc"]  # as momalisa.engine, which imports torch
Tier = Literal["full", "interval", "draft"]  # as momalisa.engine.tiers
STORE_WITHIN_S = 10.0  # of a visitor with the adapters' store


@dataclass(frozen=True)
class GenerationTask:
    """A visitor's order: one picture for each seed."""

    prompt: str  # complete, with the prefix
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    size_px: int
    negative_prompt: str = ""
    sampler: Sampler = "dpmpp_2m"
    image: bytes | None = None  # PNG, RGB, size_px square: image-to-image
    strength: float = 0.8
    mask: bytes | None = None  # PNG, L, size_px square: white is repainted
    previews: int = 0  # partial pictures wanted
    reproducible: bool = False
    adapter: str | None = None  # a LoRA's checkpoint: run/images
    key: str = ""  # whose it is: what is fair is fair among keys
    kiosk: bool = False  # the priority lane
    deadline_s: float = 300.0
    trace: bool = False
    tier: Tier = "full"
    compare: bool = False  # one seed, twice: the second picture is the challenger's
    request_id: str = field(default="", compare=False)  # for logs: what was asked for is the same under any

    @property
    def rows(self) -> int:
        """Rows of the UNet's batch for one of its pictures."""
        return 2 if self.guidance_scale > 1 else 1


@dataclass(frozen=True)
class Waiting:
    """In line: `position` tasks go first; finished in about `eta_s` seconds."""

    position: int
    eta_s: float


@dataclass(frozen=True)
class Progress:
    """A picture on its way; `preview` is a PNG of how it looks now, where previews were wanted."""

    index: int  # of the seed
    done: int
    total: int
    preview: bytes | None = None


@dataclass(frozen=True)
class Picture:
    """One finished picture, or the reason why it is withheld."""

    index: int  # of the seed
    png: bytes | None
    checkpoint: str
    filtered: str = ""


@dataclass(frozen=True)
class Completed:
    """Every picture has come. `ticks`: what the task went through, where a trace was asked for."""

    checkpoint: str
    ticks: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Rejected:
    """Not accepted: the line is full; a place is likely free after this long."""

    retry_after_s: int
    message: str = "the line is full"


@dataclass(frozen=True)
class Failed:
    """No picture came of it; the message is for the visitor."""

    message: str
    retry: bool = False  # the generator is starting or was lost: the same request may succeed soon
    late: bool = False  # its deadline passed
    wrong: bool = False  # the request cannot be, as only the engine could tell
    missing: bool = False  # it names what is not there


Outcome = Completed | Rejected | Failed
Event = Waiting | Progress | Picture | Outcome


@dataclass(frozen=True)
class State:
    """What a generator says about itself."""

    checkpoint: str
    trial: str = ""  # a newer checkpoint that gets a share of the requests
    problem: str = ""  # why refs/best is not what is served, or not as it should be
    waiting: int = 0  # pictures in line
    challenger: str = ""  # a checkpoint that visitors may compare with the present one
    picture_check: str = ""  # what finished pictures must pass


@dataclass(frozen=True)
class Ballot:
    """A visitor's vote between two checkpoints, and what the pictures had in common (no words)."""

    winner: str
    loser: str
    about: dict[str, int | float]


class Backend(Protocol):
    """What the HTTP layer needs: a generator in this process, or a handle to replicas elsewhere."""

    def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        """Events; the last is an Outcome, Rejected comes first or never. Closing it frees the rows. Does not raise."""

    async def state(self) -> State:
        """From a live generator. Raises Unavailable."""

    async def adapters(self) -> list[str]:
        """Those that a task may name. Raises Unavailable where their store does not answer."""

    async def vote(self, ballot: Ballot) -> None:
        """Keep a vote where promotion reads it. Raises Unavailable where it is not kept."""

    async def metrics(self) -> list[tuple[str, str]]:
        """(replica, Prometheus text) of every live generator."""


class Unavailable(RuntimeError):
    """No generator answers."""
