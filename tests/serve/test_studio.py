"""The painting thread: seating, leaving, deadlines, failures, and a new checkpoint's trial. The engine is a double."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from PIL import Image

from momalisa.config import Serve
from serve.easel import Easel
from serve.meters import Meters
from serve.studio import Studio
from serve.work import Busy, Commission, Event, Failed, Painted, Picture, Progress, Waiting
from tests.serve.double import black, easel, nan

LIMITS = Serve(max_rows=4, max_waiting_rows=16, max_waiting_rows_per_key=16, deadline_s=60, canary_share=0.5, canary_s=60)


def order(pictures: int = 1, steps: int = 3, **more: Any) -> Commission:
    return Commission(more.pop("prompt", "x"), tuple(range(pictures)), steps, more.pop("guidance_scale", 1.0), 16, **more)


async def events_of(studio: Studio, commission: Commission) -> list[Event]:
    async with aclosing(studio.paint(commission)) as events:
        return [event async for event in events]


async def outcome_of(studio: Studio, commission: Commission) -> Event:
    return (await events_of(studio, commission))[-1]


async def until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.005)


Studios = Callable[..., Studio]


@pytest.fixture
async def studios() -> AsyncIterator[Studios]:
    made: list[Studio] = []

    def open_studio(first: Easel, limits: Serve = LIMITS) -> Studio:
        made.append(Studio(first, limits, Meters()))
        return made[-1]

    yield open_studio
    for studio in made:
        for one in studio._easels():
            one.engine.paused = False  # type: ignore[attr-defined]
        await asyncio.to_thread(studio.close)


async def test_every_picture_comes_once_and_says_who_painted_it(studios: Studios) -> None:
    events = await events_of(studios(easel()), order(3))
    pictures = [event for event in events if isinstance(event, Picture)]
    assert sorted(picture.index for picture in pictures) == [0, 1, 2]
    for picture in pictures:
        assert picture.png is not None
        with Image.open(io.BytesIO(picture.png)) as image:
            assert image.info["seed"] == str(picture.index)
            assert image.info["checkpoint"] == picture.checkpoint == "old-1"
    assert events[-1] == Painted("old-1")


async def test_ticks_are_full_and_never_fuller_than_max_rows(studios: Studios) -> None:
    wall = easel()
    studio = studios(wall)
    await asyncio.gather(*(outcome_of(studio, order(2, guidance_scale=1 + n % 2)) for n in range(5)))
    rows = wall.engine.rows_of_ticks  # type: ignore[attr-defined]
    assert max(rows) == 4
    assert sum(row == 4 for row in rows) >= 6


async def test_who_leaves_gives_rows_and_places_back(studios: Studios) -> None:
    wall = easel(tick_s=0.01)
    studio = studios(wall)
    tasks = [asyncio.create_task(outcome_of(studio, order(4, steps=500))) for _ in range(2)]
    await until(lambda: len(wall.seats) == 4 and studio.state().waiting == 4)
    tasks[0].cancel()
    await until(lambda: len(wall.engine.cancelled) == 4)  # type: ignore[attr-defined]
    await until(lambda: studio.state().waiting == 0)
    tasks[1].cancel()
    await until(lambda: studio.load()["pending_row_steps"] == 0)
    assert await outcome_of(studio, order()) == Painted("old-1")


async def test_the_line_is_bounded_and_says_when_to_come_back(studios: Studios) -> None:
    wall = easel(tick_s=0.01)
    studio = studios(wall)
    tasks = [asyncio.create_task(outcome_of(studio, order(4, steps=200)))]
    await until(lambda: len(wall.seats) == 4)
    tasks += [asyncio.create_task(outcome_of(studio, order(4, steps=200))) for _ in range(4)]
    await until(lambda: studio.state().waiting == 16)
    refused = await outcome_of(studio, order())
    assert isinstance(refused, Busy)
    assert 1 <= refused.retry_after_s <= 60
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_places_and_times_are_told(studios: Studios) -> None:
    wall = easel(tick_s=0.02)
    studio = studios(wall)
    first = asyncio.create_task(outcome_of(studio, order(4, steps=60)))
    await until(lambda: len(wall.seats) == 4)
    second = asyncio.create_task(events_of(studio, order(1, steps=20, key="second")))
    third = asyncio.create_task(events_of(studio, order(1, steps=20, key="third")))
    _, told, later = await asyncio.gather(first, second, third)
    places = [[event for event in events if isinstance(event, Waiting)] for events in (told, later)]
    assert (places[0][0].position, places[1][0].position) == (1, 2)
    assert places[1][0].eta_s >= places[0][0].eta_s > 0
    assert places[0][-1].position == 0


async def test_previews_come_before_the_picture(studios: Studios) -> None:
    events = await events_of(studios(easel(tick_s=0.02)), order(1, steps=6, previews=3))
    previews = [event for event in events if isinstance(event, Progress)]
    assert previews
    assert all(event.total == 6 and event.preview for event in previews)
    assert events.index(previews[-1]) < next(n for n, event in enumerate(events) if isinstance(event, Picture))


async def test_a_deadline_that_cannot_be_kept_is_not_accepted_and_one_that_passes_is_said(studios: Studios) -> None:
    wall = easel(tick_s=0.02)
    studio = studios(wall)
    assert isinstance(await outcome_of(studio, order(1, steps=20)), Painted)  # now its pace is known
    assert isinstance(await outcome_of(studio, order(4, steps=1000, deadline_s=0.5)), Busy)
    wall.engine.paused = True  # type: ignore[attr-defined]
    late = await outcome_of(studio, order(1, steps=1, deadline_s=0.3))
    assert isinstance(late, Failed)
    assert late.late
    wall.engine.paused = False  # type: ignore[attr-defined]
    await until(lambda: not wall.seats)


async def test_one_bad_request_spoils_no_other(studios: Studios) -> None:
    studio = studios(easel(spoil=lambda request: nan(request) if request.prompt == "bad" else None))
    asked = [order(prompt="bad"), order(), order(prompt="impossible"), order(2)]
    bad, good, impossible, also_good = await asyncio.gather(*(outcome_of(studio, one) for one in asked))
    assert isinstance(bad, Failed)
    assert "log says why" in bad.message
    assert isinstance(impossible, Failed)
    assert (impossible.message, impossible.wrong) == ("this cannot be", True)
    assert (good, also_good) == (Painted("old-1"), Painted("old-1"))


async def test_a_flat_picture_is_never_handed_out(studios: Studios) -> None:
    assert isinstance(await outcome_of(studios(easel(spoil=black)), order()), Failed)


async def test_an_engine_that_dies_fails_what_it_had_and_the_health_check(studios: Studios, monkeypatch: Any) -> None:
    wall = easel()
    studio = studios(wall)
    monkeypatch.setattr(wall.engine, "tick", lambda: 1 / 0)
    lost = await outcome_of(studio, order())
    assert isinstance(lost, Failed)
    assert lost.retry
    with pytest.raises(RuntimeError, match="painting thread has ended"):
        studio.state()
    assert isinstance(await outcome_of(studio, order()), Failed)


async def test_a_trace_tells_the_ticks(studios: Studios) -> None:
    painted = await outcome_of(studios(easel()), order(2, steps=4, trace=True))
    assert isinstance(painted, Painted)
    assert [tick["rows"] for tick in painted.ticks][:4] == [2, 2, 2, 2]
    assert len(painted.ticks) == 4


# ---- promotion

TRIED = LIMITS.model_copy(update={"canary_s": 0.6})


async def painters(studio: Studio, seconds: float, steps: int = 3) -> list[str]:
    """A load of four visitors for a while; whose pictures they got."""
    end, got = time.monotonic() + seconds, []

    async def visitor() -> None:
        while time.monotonic() < end:
            events = await events_of(studio, order(1, steps=steps))
            assert isinstance(events[-1], Painted), events[-1]
            got.extend(event.checkpoint for event in events if isinstance(event, Picture))

    await asyncio.gather(*(visitor() for _ in range(4)))
    return got


async def test_a_good_checkpoint_takes_over_and_nobody_notices(studios: Studios) -> None:
    studio = studios(easel(), TRIED)
    load = asyncio.create_task(painters(studio, 1.5))
    await asyncio.sleep(0.2)
    studio.hang(easel("new-2"))
    assert studio.state().trial == "new-2"
    got = await load
    share = got[: len(got) // 2].count("new-2") / (len(got) // 2)
    assert 0 < share < 0.8
    assert set(got[-4:]) == {"new-2"}
    await until(lambda: studio._retiring == [])
    assert (studio.state().checkpoint, studio.state().trial) == ("new-2", "")


@pytest.mark.parametrize("spoil", [nan, black])
async def test_a_checkpoint_that_paints_nothing_is_given_up_and_nobody_notices(studios: Studios, spoil: Any) -> None:
    studio = studios(easel(), TRIED)
    rejected: list[str] = []
    studio.on_rejected = lambda one, problem: rejected.append(f"{one.checkpoint}: {problem}")
    load = asyncio.create_task(painters(studio, 1.0))
    await asyncio.sleep(0.1)
    studio.hang(easel("new-2", spoil))
    assert set(await load) == {"old-1"}
    assert len(rejected) == 1
    assert rejected[0].startswith("new-2: ")
    assert (studio.state().checkpoint, studio.state().trial) == ("old-1", "")


async def test_a_slow_checkpoint_is_given_up(studios: Studios) -> None:
    studio = studios(easel(tick_s=0.001), LIMITS)
    rejected: list[str] = []
    studio.on_rejected = lambda one, problem: rejected.append(problem)
    slow = easel("new-2")
    slow_tick = slow.engine.tick

    def tick() -> Any:
        for seat in list(slow.seats.values()):
            seat.seated_at -= 0.5  # as if each tick had taken half a second longer
        return slow_tick()

    slow.engine.tick = tick  # type: ignore[method-assign]
    studio.hang(slow)
    await painters(studio, 1.0)
    assert len(rejected) == 1
    assert "s a step" in rejected[0]


async def test_a_long_request_ends_on_the_weights_it_began_with(studios: Studios) -> None:
    old = easel(tick_s=0.01)
    studio = studios(old, LIMITS.model_copy(update={"canary_s": 0}))
    long = asyncio.create_task(events_of(studio, order(4, steps=50)))
    await until(lambda: len(old.seats) == 4)
    studio.hang(easel("new-2"))
    await until(lambda: studio.state().checkpoint == "new-2")
    assert {event.checkpoint for event in await long if isinstance(event, Picture)} == {"old-1"}
    assert await outcome_of(studio, order()) == Painted("new-2")


async def test_a_pointer_moved_back_ends_the_trial(studios: Studios) -> None:
    studio = studios(easel(), LIMITS)
    new = easel("new-2", tick_s=0.01)
    studio.hang(new)
    long = [asyncio.create_task(outcome_of(studio, order(1, steps=300))) for _ in range(4)]
    await until(lambda: new.seats)
    studio.withdraw("refs/best was moved back")
    assert await asyncio.gather(*long) == [Painted("old-1")] * 4
