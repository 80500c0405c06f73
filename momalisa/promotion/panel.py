"""Who measures what, and when: losses of every checkpoint, the gates only of those that could win.

The measuring itself is handed to `call`, which may run it anywhere: one after another here, or as tasks on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from momalisa import votes
from momalisa.checkpoint import Checkpoint
from momalisa.config import Settings
from momalisa.promotion import general, measure
from momalisa.promotion.decision import UNSEEN, Decision, Evidence, Poll, failures, poll, tied
from momalisa.promotion.measure import DISTANCE, GATES, LOSSES, Measured
from momalisa.storage import Store
from momalisa.training.run import Plan

Call = Callable[[Callable[..., Any], list[tuple[Any, ...]]], list[Any]]  # a function, its calls -> their results in order


def one_by_one(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """`call` in this process."""
    return [function(*arguments) for arguments in calls]


class Panel:
    """Measures the checkpoints of a run as far as a decision needs, through `call`."""

    def __init__(self, settings: Settings, planned: Plan, found: Sequence[Checkpoint], call: Call = one_by_one) -> None:
        self.settings, self.planned, self.found, self.call = settings, planned, list(found), call
        self.broken: dict[str, str] = {}

    def decide(self) -> Decision:
        """The best by the rules of `decision`."""
        chosen = self.settings.promote
        base, candidates = self.losses()
        if chosen.measure_all:
            self.look_at([base, *candidates])
        leader, reason = self._leader(base, candidates)
        preferred, said = self._preferred(base, candidates, leader) if leader else (None, None)
        if leader and said and preferred:
            leader, reason = preferred, f"{said.count} votes prefer it to {leader.name}"
        whole = [one for one in candidates if one.name not in self.broken]
        if leader is None and chosen.allow_worse and whole:
            leader, reason = min(whole, key=lambda one: one.loss), "promote.allow_worse: lowest held-out loss of all"
        collection = None
        if leader and self._distances():
            self._measure_distance([base, leader])
            collection = self.call(measure.collection_distance, [(self.settings, self.planned)])[0]
        parts = {"votes": said} if said else {}
        return Decision(leader, reason, base, whole, broken=self.broken, collection=collection, **parts)

    def losses(self) -> tuple[Evidence, list[Evidence]]:
        """The base, and every whole checkpoint, with their losses."""
        wanted: list[Checkpoint | None] = [None, *self.found]
        evidence = []
        for checkpoint, result in zip(wanted, self._measure(wanted, LOSSES), strict=True):
            if result is not None:
                evidence.append(Evidence(checkpoint, np.array(result["held_out"])))
        return evidence[0], evidence[1:]

    def look_at(self, several: Sequence[Evidence]) -> None:
        """Have measured what the gates ask for, where the settings want that."""
        wanted, chosen = [one for one in several if not one.looked_at], self.settings.promote
        if not wanted or not (chosen.gate_pictures or chosen.general_pictures):
            return
        if chosen.general_pictures and not Store(self.settings.root).exists(general.path(self.settings)):
            print(f"promote: the base draws {chosen.general_pictures} general captions, once", flush=True)
            self.call(measure.draw_general, [(self.settings,)])
        for one, result in zip(wanted, self._measure([one.checkpoint for one in wanted], GATES), strict=True):
            if result is not None:
                one.looked_at = True
                one.general = np.array(result["general"]) if result["general"] else None
                one.alignment = np.array(result["alignment"]) if result["alignment"] else None
                one.nearest, one.copy_limit = result["nearest"], result["limit"]
        if chosen.gate_pictures and wanted[0].checkpoint is None and not any(one.copies for one in wanted):
            print(f"promote: {UNSEEN}", flush=True)

    def _leader(self, base: Evidence, candidates: Sequence[Evidence]) -> tuple[Evidence | None, str]:
        """The winner among those that pass; the pictures of those that lead are looked at, then of the next."""
        chosen = self.settings.promote
        rest = [one for one in candidates if not failures(chosen, base, one)]
        while rest:
            leading = tied(rest)
            self.look_at([base, *leading])
            if passed := [one for one in leading if self._passes(base, one)]:
                return self._nearest(passed)
            rest = [one for one in rest if one not in leading]
        return None, "no checkpoint is better than the base and passes every gate"

    def _passes(self, base: Evidence, one: Evidence) -> bool:
        return one.name not in self.broken and not failures(self.settings.promote, base, one)

    def _preferred(self, base: Evidence, candidates: Sequence[Evidence], leader: Evidence) -> tuple[Evidence | None, Poll]:
        """Whom people clearly prefer to the leader, the strongest that passes the gates; and what they said."""
        cast = votes.read(Store(self.settings.root))
        refused: list[str] = []
        first = said = poll(cast, candidates, leader)
        while said.count >= self.settings.promote.votes_needed and said.clear:
            one = next(one for one in candidates if one.name == said.strongest)
            self.look_at([base, one])
            if self._passes(base, one):
                return one, said
            refused.append(one.name)
            said = poll(cast, candidates, leader, refused)
        return None, first

    def _nearest(self, passed: Sequence[Evidence]) -> tuple[Evidence, str]:
        """Of tied checkpoints the nearest to the collection, where it is large enough to tell; else the lowest loss."""
        lowest = min(passed, key=lambda one: one.loss)
        if len(passed) == 1:
            return lowest, "lowest held-out loss of those that pass every gate"
        chosen, needed = self.settings.promote, self.settings.promote.tie_pictures
        if not self._distances():
            why = "promote.distance_pictures or promote.clip_model is not set"
        elif chosen.distance_pictures < needed:
            why = f"promote.distance_pictures={chosen.distance_pictures} is below promote.tie_pictures={needed}"
        elif (counted := min(self._measure_distance(passed))) < needed:
            why = f"{counted} held-out works to compare with, promote.tie_pictures={needed}"
        else:
            nearest = min(passed, key=lambda one: one.mmd if one.mmd is not None else np.inf)
            return nearest, f"nearest to the collection of {len(passed)} whose held-out losses are tied"
        return lowest, f"lowest held-out loss, tied with {len(passed) - 1} others that no distance tells apart ({why})"

    def _distances(self) -> bool:
        return bool(self.settings.promote.distance_pictures and self.settings.promote.clip_model)

    def _measure_distance(self, several: Sequence[Evidence]) -> list[int]:
        """How many pictures of the collection each was compared with."""
        results = self._measure([one.checkpoint for one in several], DISTANCE)
        for one, result in zip(several, results, strict=True):
            one.mmd = result["mmd"] if result else None
        return [int(result["pictures"]) if result else 0 for result in results]

    def _measure(self, several: Sequence[Checkpoint | None], what: str) -> list[Measured | None]:
        """Results in order, None for a checkpoint that is not whole; only what is not known yet is called for."""
        paths = [one.path if one else None for one in several]
        results = {path: measure.known(self.settings, self.planned, path, what) for path in paths}
        missing = [path for path, result in results.items() if result is None]
        calls = [(self.settings, self.planned, path, what) for path in missing]
        results |= dict(zip(missing, self.call(measure.measured, calls) if calls else [], strict=True))
        for checkpoint in several:
            result = results[checkpoint.path if checkpoint else None]
            if checkpoint and result and "error" in result:
                self.broken[checkpoint.name] = result["error"]
                print(f"promote: {checkpoint.name} is passed over: {result['error']}", flush=True)
        return [None if (result := results[path]) and "error" in result else result for path in paths]
