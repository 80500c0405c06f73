"""The order of arguments, from measurements to a choice. Nothing here measures, reads or writes.

1. A checkpoint must have a lower held-out loss than the base, and pass the gates:
   general    its loss on general captions is at most `general_tolerance` above the base's
   alignment  its mean score is not below the base's 95% interval (less `alignment_slack`)
   copies     the share of copied training pictures is not above `copy_rate`, beyond chance (Wilson's interval)
2. Of those the lowest held-out loss leads. Whoever's paired difference to it may be 0 (95%) is tied with it; where the
   collection has `tie_pictures` to compare with, the smallest distance to it (unbiased MMD) decides among them.
3. People are above numbers, but not above gates: with `votes_needed` pairwise votes, a checkpoint whose Bradley-Terry
   strength is above the leader's by an interval that excludes a tie is chosen instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from momalisa import copies, votes
from momalisa.checkpoint import Checkpoint
from momalisa.config import Promote
from momalisa.copies import CopyRate
from momalisa.quality import Difference, interval, paired_difference
from momalisa.votes import Vote

BASE = "base"
UNSEEN = "the copy gate is left out: not enough works have a thumbnail to compare with"


@dataclass(eq=False)
class Evidence:
    """What is known of a model; `checkpoint` None: the base. None for what was not measured."""

    checkpoint: Checkpoint | None
    held_out: np.ndarray  # [works]
    general: np.ndarray | None = None  # [captions]
    alignment: np.ndarray | None = None  # [pictures]
    nearest: list[float] | None = None  # [pictures]: to the nearest training picture
    copy_limit: float | None = None
    mmd: float | None = None
    looked_at: bool = False  # whether the gates were measured

    @property
    def name(self) -> str:
        return BASE if self.checkpoint is None else self.checkpoint.name

    @property
    def length(self) -> float | None:
        """sigma_rel of a power-function average that was made after training; None for what training wrote."""
        made = self.checkpoint.training.get("average") if self.checkpoint else None
        return float(made["sigma_rel"]) if made else None

    @property
    def loss(self) -> float:
        return float(self.held_out.mean())

    @property
    def copies(self) -> CopyRate | None:
        return copies.rate(self.nearest, self.copy_limit) if self.nearest and self.copy_limit is not None else None


def failures(settings: Promote, base: Evidence, one: Evidence) -> list[str]:
    """Why a checkpoint may not be promoted, in words; none if it may, as far as it was measured."""
    found = []
    if one.loss >= base.loss:
        found.append(f"held-out loss {one.loss:.5f} is not below the base's {base.loss:.5f}")
    if (worse := forgotten(base, one)) is not None and worse > settings.general_tolerance:
        found.append(f"general captions {worse:+.1%} against the base (at most {settings.general_tolerance:+.1%})")
    if one.alignment is not None and base.alignment is not None:
        low = interval(base.alignment).low - settings.alignment_slack
        if (mean := float(one.alignment.mean())) < low:
            found.append(f"alignment {mean:.4f} is below the base's interval (at least {low:.4f})")
    if (rate := one.copies) is not None and rate.low > settings.copy_rate:
        found.append(f"{rate.share:.0%} of its pictures are copies of training pictures (at most {settings.copy_rate:.0%})")
    return found


def forgotten(base: Evidence, one: Evidence) -> float | None:
    """How much worse a checkpoint is on general captions, as a share of the base's loss."""
    if base.general is None or one.general is None:
        return None
    return float(one.general.mean() / base.general.mean() - 1)


def tied(field_: Sequence[Evidence]) -> list[Evidence]:
    """The lowest held-out loss, and whoever cannot be told from it on the same works."""
    lowest = min(field_, key=lambda one: one.loss)
    others = [one for one in field_ if one is not lowest]
    return [lowest, *(one for one in others if paired_difference(lowest.held_out, one.held_out).low <= 0)]


@dataclass(frozen=True)
class Poll:
    """What people said about the candidates."""

    count: int
    strongest: str | None = None
    over_leader: tuple[float, float, float] | None = None  # log odds against the leader and their 95% interval

    @property
    def clear(self) -> bool:
        return self.over_leader is not None and self.over_leader[1] > 0


def poll(cast: Sequence[Vote], field_: Sequence[Evidence], leader: Evidence, refused: Sequence[str] = ()) -> Poll:
    """The votes between candidates (and the base), and how far the strongest candidate that was not `refused` (by name) is above
    the leader."""
    names = {one.name for one in field_}
    spelled = {one.checkpoint.id: one.name for one in field_ if one.checkpoint}  # as the server names them
    named = [Vote(spelled.get(vote.winner, vote.winner), spelled.get(vote.loser, vote.loser)) for vote in cast]
    counted = [vote for vote in named if {vote.winner, vote.loser} <= names | {BASE}]
    voted = {name for vote in counted for name in (vote.winner, vote.loser)}
    if leader.name not in voted:
        return Poll(len(counted))
    strengths = votes.fit(counted)
    strongest = max(sorted((voted & names) - set(refused)), key=lambda name: strengths.values[strengths.names.index(name)])
    return Poll(len(counted), strongest, strengths.difference(strongest, leader.name) if strongest != leader.name else None)


@dataclass(frozen=True)
class Decision:
    """The choice and everything it rests on; `best` None: nothing may be promoted."""

    best: Evidence | None
    reason: str
    base: Evidence
    candidates: list[Evidence]
    votes: Poll = field(default_factory=lambda: Poll(0))
    broken: dict[str, str] = field(default_factory=dict)  # name of a checkpoint that is not whole -> why
    collection: float | None = None  # MMD^2 of the collection to more of itself

    @property
    def delta(self) -> Difference | None:
        return paired_difference(self.base.held_out, self.best.held_out) if self.best else None

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(images seen, held-out loss) of the base and of what training wrote."""
        return [(seen(one), one.loss) for one in (self.base, *self.candidates) if one.length is None]

    def scores(self) -> dict[str, Any]:
        """The figures that `refs/best` carries."""
        assert self.best is not None
        assert self.delta is not None
        rate, base_rate = self.best.copies, self.base.copies
        return {
            "heldout_loss_base": self.base.loss,
            "heldout_loss_best": self.best.loss,
            "heldout_loss_delta_ci95": [self.delta.low, self.delta.high],
            "heldout_curve": [list(point) for point in self.curve],
            "ema_length": self.best.length,
            "general_change": forgotten(self.base, self.best),
            "alignment_base": _mean(self.base.alignment),
            "alignment_best": _mean(self.best.alignment),
            "copy_rate_base": base_rate.share if base_rate else None,
            "copy_rate_best": rate.share if rate else None,
            "mmd_base": self.base.mmd,
            "mmd_best": self.best.mmd,
            "mmd_collection": self.collection,
            "votes": self.votes.count,
            "reason": self.reason,
        }


def seen(one: Evidence) -> int:
    return one.checkpoint.images_seen if one.checkpoint else 0


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None else float(values.mean())
