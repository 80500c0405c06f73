"""A tier is less work for the same request."""

from __future__ import annotations

from typing import get_args

from momalisa.engine import Engine, Request, Tier, at_tier

REQUEST = Request("a red boat", steps=20, guidance_scale=5.0, size_px=64)


def test_every_tier_is_cheaper_than_the_one_before(engine: Engine) -> None:
    work = []
    for tier in get_args(Tier):
        number = engine.submit(at_tier(REQUEST, tier))
        work.append(engine.pending_row_steps)
        engine.cancel(number)
    assert work[0] == 40
    assert work == sorted(work, reverse=True)
    assert len(set(work)) == len(work)


def test_the_full_tier_changes_nothing_and_one_step_stays_one() -> None:
    assert at_tier(REQUEST, "full") == REQUEST
    assert at_tier(Request("a", steps=1), "draft").steps == 1
