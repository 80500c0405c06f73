"""Finished pictures are decoded among a few others while the engine is full, not late, and at once where there is room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from momalisa.config import Diffusion
from momalisa.engine import Done, Engine, Request
from momalisa.engine.decoding import FEW, PATIENCE

STEPS = 6
Started = Callable[[int], tuple[Engine, list[int]]]


def asked(seed: int) -> Request:
    return Request("a red boat", seed=seed, steps=STEPS, guidance_scale=2.0, size_px=32)


@pytest.fixture
def started(diffusion: Diffusion, monkeypatch: pytest.MonkeyPatch) -> Started:
    def make(max_rows: int) -> tuple[Engine, list[int]]:
        """An engine, and how many pictures it decodes at a time."""
        engine, together = Engine.load(diffusion, max_rows=max_rows), list[int]()
        decode = engine.autoencoder.decode

        def noted(latents: Any) -> Any:
            together.append(len(latents))
            return decode(latents)

        monkeypatch.setattr(engine.autoencoder, "decode", noted)
        return engine, together

    return make


def told(engine: Engine, places: int, pictures: int) -> dict[int, tuple[int, int]]:
    """Start one picture a tick at `places`, another in each one's place -> {id: (tick of its last step, tick it came in)}."""
    flying: dict[int, int] = {}
    last: dict[int, int] = {}
    came: dict[int, tuple[int, int]] = {}
    for tick in range(1000):
        if len(flying) < places and len(last) + len(flying) < pictures:
            flying[engine.submit(asked(len(last) + len(flying)))] = 0
        events = engine.tick()
        for id_ in engine.stepped:
            flying[id_] += 1
            if flying[id_] == STEPS:
                last[id_] = tick
                del flying[id_]
        came |= {event.id: (last[event.id], tick) for event in events if isinstance(event, Done)}
        if len(came) == pictures:
            break
    return came


def test_where_the_engine_is_full_pictures_wait_for_others_but_not_for_long(started: Started) -> None:
    engine, together = started(2 * STEPS)
    came = told(engine, places=STEPS, pictures=4 * STEPS)
    assert len(came) == sum(together) == 4 * STEPS
    assert all(tick - last <= PATIENCE for last, tick in came.values())
    assert together.count(FEW) >= 3  # one ends at every tick
    assert engine.idle


def test_a_lone_picture_of_a_full_engine_comes_when_nothing_is_left_to_wait_for(started: Started) -> None:
    engine, together = started(2)
    assert all(tick - last <= PATIENCE for last, tick in told(engine, places=1, pictures=3).values())
    assert sum(together) == 3


def test_where_there_is_room_a_picture_waits_for_nobody(started: Started) -> None:
    engine, together = started(2 * STEPS + 2)
    came = told(engine, places=STEPS, pictures=2 * STEPS)
    assert all(tick == last for last, tick in came.values())
    assert set(together) == {1}
