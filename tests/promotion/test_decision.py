"""The rules: who may be promoted, who leads, who breaks a tie, and when people overrule numbers."""

from __future__ import annotations

import numpy as np
import pytest

from momalisa.config import Promote
from momalisa.promotion.decision import BASE, failures, forgotten, poll, tied
from momalisa.votes import Vote
from tests.promotion.conftest import evidence

RULES = Promote()


def test_a_better_checkpoint_passes_and_a_worse_one_does_not() -> None:
    base = evidence(None, 1.0)
    assert failures(RULES, base, evidence(10, 0.9)) == []
    assert failures(RULES, base, evidence(10, 1.0)) == ["held-out loss 1.00000 is not below the base's 1.00000"]


@pytest.mark.parametrize(("worse", "passes"), [(-0.2, True), (0.019, True), (0.021, False)])
def test_general_captions_may_be_two_percent_worse(worse: float, passes: bool) -> None:
    losses = np.linspace(0.5, 1.5, 200)
    base, one = evidence(None, 1.0, general=losses), evidence(10, 0.9, general=losses * (1 + worse))
    assert forgotten(base, one) == pytest.approx(worse)
    assert (failures(RULES, base, one) == []) is passes
    looser = Promote(general_tolerance=0.5)
    assert failures(looser, base, one) == []


def test_alignment_stays_within_the_base_s_interval() -> None:
    scores = np.random.default_rng(0).normal(0.3, 0.1, 400)  # its mean's interval is about 0.01 to either side
    base = evidence(None, 1.0, alignment=scores)
    assert failures(RULES, base, evidence(10, 0.9, alignment=scores - 0.005)) == []
    assert failures(RULES, base, evidence(10, 0.9, alignment=scores + 1)) == []
    (said,) = failures(RULES, base, evidence(10, 0.9, alignment=scores - 0.03))
    assert "is below the base's interval" in said
    assert failures(Promote(alignment_slack=0.05), base, evidence(10, 0.9, alignment=scores - 0.03)) == []


def test_copies_are_too_many_only_beyond_chance() -> None:
    base = evidence(None, 1.0)

    def with_copies(count: int, of: int) -> list[str]:
        return failures(RULES, base, evidence(10, 0.9, nearest=[0.01] * count + [1.0] * (of - count), copy_limit=0.1))

    assert with_copies(3, 48) == []  # 6%, which 5% gives often
    assert with_copies(8, 48) == ["17% of its pictures are copies of training pictures (at most 5%)"]
    assert with_copies(4, 48) == []
    assert with_copies(48, 48)


def test_ties_are_those_that_the_works_cannot_tell_apart() -> None:
    lowest, clear = evidence(10, 0.80), evidence(30, 0.83)
    near = evidence(20, 0.801)
    near.held_out = lowest.held_out + np.where(np.arange(41) % 2, 0.1, -0.09)
    assert tied([clear, near, lowest]) == [lowest, near]
    assert tied([clear]) == [clear]


def votes_for(one: str, other: str, wins: int, losses: int) -> list[Vote]:
    return [Vote(one, other)] * wins + [Vote(other, one)] * losses


def test_people_are_clear_when_their_interval_excludes_a_tie() -> None:
    first, second = evidence(10, 0.8), evidence(20, 0.9)
    candidates = [first, second]
    clear = poll(votes_for("run@20", "run@10", 140, 60), candidates, leader=first)
    assert (clear.count, clear.strongest, clear.clear) == (200, "run@20", True)
    assert not poll(votes_for("run@20", "run@10", 105, 95), candidates, leader=first).clear
    assert not poll(votes_for("run@10", "run@20", 200, 0), candidates, leader=first).clear  # they agree
    elsewhere = poll(votes_for("other@1", "run@10", 300, 0), candidates, leader=first)
    assert (elsewhere.count, elsewhere.clear) == (0, False)
    beside = votes_for("run@20", BASE, 300, 0)
    assert not poll(beside, candidates, leader=first).clear  # nobody compared the leader
    as_served = votes_for("run-20", "run-10", 140, 60)
    assert poll(as_served, candidates, leader=first).strongest == "run@20"
    through = poll(beside + votes_for(BASE, "run@10", 100, 20), candidates, leader=first)
    assert through.clear  # through the base


def test_whoever_was_refused_is_not_the_strongest_but_its_votes_count() -> None:
    first, second, third = evidence(10, 0.8), evidence(20, 0.9), evidence(30, 0.95)
    cast = votes_for("run@30", "run@10", 150, 50) + votes_for("run@20", "run@10", 140, 60)
    said = [poll(cast, [first, second, third], first, refused) for refused in ([], ["run@30"], ["run@30", "run@20"])]
    assert [(one.count, one.strongest, one.clear) for one in said] == [
        (400, "run@30", True),
        (400, "run@20", True),
        (400, "run@10", False),
    ]
