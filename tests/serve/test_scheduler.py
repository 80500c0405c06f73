"""The scheduler: starting, leaving, deadlines, failures, and a new checkpoint's trial. The engine is a double."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from PIL import Image

from momalisa.config import EVALUATION_PROMPTS, Serve
from momalisa.storage import StorageError
from serve.canary import ENOUGH_PICTURES, ENOUGH_TICKS, Canary
from serve.loaded_checkpoint import LoadedCheckpoint, requests_of
from serve.meters import Meters
from serve.rehearsal import sample_of
from serve.rollout import Rollout
from serve.scheduler import Scheduler
from serve.task import Completed, Event, Failed, GenerationTask, Picture, Progress, Rejected, Waiting
from tests.serve.double import black, loaded, nan

LIMITS = Serve(max_rows=4, max_waiting_rows=16, max_waiting_rows_per_key=16, deadline_s=60, canary_share=0.5, canary_s=60)


def task_of(pictures: int = 1, steps: int = 3, **more: Any) -> GenerationTask:
    return GenerationTask(more.pop("prompt", "x"), tuple(range(pictures)), steps, more.pop("guidance_scale", 1.0), 16, **more)


async def events_of(scheduler: Scheduler, task: GenerationTask) -> list[Event]:
    async with aclosing(scheduler.generate(task)) as events:
        return [event async for event in events]


async def outcome_of(scheduler: Scheduler, task: GenerationTask) -> Event:
    return (await events_of(scheduler, task))[-1]


async def until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.005)


Schedulers = Callable[..., Scheduler]


@pytest.fixture
async def schedulers() -> AsyncIterator[Schedulers]:
    made: list[Scheduler] = []

    def started(first: LoadedCheckpoint, limits: Serve = LIMITS) -> Scheduler:
        made.append(Scheduler(first, limits, Meters()))
        return made[-1]

    yield started
    for scheduler in made:
        for one in scheduler._rollout.checkpoints():
            one.engine.paused = False  # type: ignore[attr-defined]
        await asyncio.to_thread(scheduler.close)


async def test_every_picture_comes_once_and_says_who_painted_it(schedulers: Schedulers) -> None:
    events = await events_of(schedulers(loaded()), task_of(3))
    pictures = [event for event in events if isinstance(event, Picture)]
    assert sorted(picture.index for picture in pictures) == [0, 1, 2]
    for picture in pictures:
        assert picture.png is not None
        with Image.open(io.BytesIO(picture.png)) as image:
            assert image.info["seed"] == str(picture.index)
            assert image.info["checkpoint"] == picture.checkpoint == "old-1"
    assert events[-1] == Completed("old-1")


async def test_ticks_are_full_and_never_fuller_than_max_rows(schedulers: Schedulers) -> None:
    main = loaded()
    scheduler = schedulers(main)
    await asyncio.gather(*(outcome_of(scheduler, task_of(2, guidance_scale=1 + n % 2)) for n in range(5)))
    rows = main.engine.rows_of_ticks  # type: ignore[attr-defined]
    assert max(rows) == 4
    assert sum(row == 4 for row in rows) >= 6


async def test_pictures_that_are_being_decoded_take_nobodys_rows(schedulers: Schedulers) -> None:
    main = loaded(tick_s=0.01)
    main.engine.paused, main.engine.decode_ticks = True, 2  # type: ignore[attr-defined]
    scheduler = schedulers(main)
    tasks = [asyncio.create_task(outcome_of(scheduler, task_of(4, steps=3))) for _ in range(4)]
    await until(lambda: scheduler.state().waiting == 12)
    main.engine.paused = False  # type: ignore[attr-defined]
    assert await asyncio.gather(*tasks) == [Completed("old-1")] * 4
    rows = main.engine.rows_of_ticks  # type: ignore[attr-defined]
    assert max(rows) == 4
    assert rows[:12].count(4) >= 10  # 8 where the next wait for the decoder


async def test_no_more_is_begun_while_pictures_are_not_decoded(schedulers: Schedulers) -> None:
    main = loaded()
    main.engine.decode_ticks = 10**9  # type: ignore[attr-defined]
    scheduler = schedulers(main)
    tasks = [asyncio.create_task(outcome_of(scheduler, task_of(4, steps=1))) for _ in range(4)]
    await until(lambda: len(main.engine.finished) >= 8)  # type: ignore[attr-defined]
    ticks = len(main.engine.rows_of_ticks)  # type: ignore[attr-defined]
    await until(lambda: len(main.engine.rows_of_ticks) >= ticks + 5)  # type: ignore[attr-defined]
    assert len(main.engine.finished) == 8  # type: ignore[attr-defined]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: not main.engine.finished)  # type: ignore[attr-defined]
    main.engine.decode_ticks = 0  # type: ignore[attr-defined]
    assert await outcome_of(scheduler, task_of()) == Completed("old-1")


async def test_who_leaves_gives_rows_and_places_back(schedulers: Schedulers) -> None:
    main = loaded(tick_s=0.01)
    scheduler = schedulers(main)
    asked = [task_of(3, steps=500), task_of(4, steps=500, guidance_scale=2.0)]
    tasks = [asyncio.create_task(outcome_of(scheduler, task)) for task in asked]
    await until(lambda: len(main.running) == 3 and scheduler.state().waiting == 4)
    rows = main.engine.rows_of_ticks  # type: ignore[attr-defined]
    await until(lambda: rows)
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    ticks = len(rows)  # the next one may have begun
    await until(lambda: len(rows) >= ticks + 3)
    assert set(rows[:ticks]) == {3}
    assert set(rows[ticks + 1 :]) == {4}
    assert len(main.engine.cancelled) == 3  # type: ignore[attr-defined]
    tasks[1].cancel()
    await until(lambda: scheduler.load()["pending_row_steps"] == 0)
    assert await outcome_of(scheduler, task_of()) == Completed("old-1")


async def test_the_line_is_bounded_and_says_when_to_come_back(schedulers: Schedulers) -> None:
    main = loaded(tick_s=0.01)
    scheduler = schedulers(main)
    tasks = [asyncio.create_task(outcome_of(scheduler, task_of(4, steps=200)))]
    await until(lambda: len(main.running) == 4)
    tasks += [asyncio.create_task(outcome_of(scheduler, task_of(4, steps=200))) for _ in range(4)]
    await until(lambda: scheduler.state().waiting == 16)
    refused = [await outcome_of(scheduler, task_of(2, steps=200)) for _ in range(5)]
    waits = [outcome.retry_after_s for outcome in refused if isinstance(outcome, Rejected)]
    assert len(waits) == 5
    assert waits == sorted(waits)
    assert len(set(waits)) >= 3  # a crowd does not come back at once
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_places_and_times_are_told(schedulers: Schedulers) -> None:
    main = loaded(tick_s=0.02)
    scheduler = schedulers(main)
    first = asyncio.create_task(outcome_of(scheduler, task_of(4, steps=60)))
    await until(lambda: len(main.running) == 4)
    main.engine.paused = True  # type: ignore[attr-defined]
    second = asyncio.create_task(events_of(scheduler, task_of(1, steps=20, key="second")))
    await until(lambda: scheduler.state().waiting == 1)
    third = asyncio.create_task(events_of(scheduler, task_of(1, steps=20, key="third")))
    await until(lambda: scheduler.state().waiting == 2)
    main.engine.paused = False  # type: ignore[attr-defined]
    _, told, later = await asyncio.gather(first, second, third)
    places = [[event for event in events if isinstance(event, Waiting)] for events in (told, later)]
    assert (places[0][0].position, places[1][0].position) == (1, 2)
    assert places[1][0].eta_s >= places[0][0].eta_s > 0
    assert places[0][-1].position == 0


async def test_previews_come_before_the_picture(schedulers: Schedulers) -> None:
    events = await events_of(schedulers(loaded(tick_s=0.02)), task_of(1, steps=6, previews=3))
    previews = [event for event in events if isinstance(event, Progress)]
    assert previews
    assert all(event.total == 6 and event.preview for event in previews)
    assert events.index(previews[-1]) < next(n for n, event in enumerate(events) if isinstance(event, Picture))


async def test_a_deadline_that_cannot_be_kept_is_not_accepted_and_one_that_passes_is_said(schedulers: Schedulers) -> None:
    main = loaded(tick_s=0.02)
    scheduler = schedulers(main)
    assert isinstance(await outcome_of(scheduler, task_of(1, steps=20)), Completed)  # now its pace is known
    assert isinstance(await outcome_of(scheduler, task_of(4, steps=1000, deadline_s=0.5)), Rejected)
    main.engine.paused = True  # type: ignore[attr-defined]
    late = await outcome_of(scheduler, task_of(1, steps=1, deadline_s=0.3))
    assert isinstance(late, Failed)
    assert late.late
    main.engine.paused = False  # type: ignore[attr-defined]
    await until(lambda: not main.running)


async def test_one_bad_request_spoils_no_other(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(spoil=lambda request: nan(request) if request.prompt == "bad" else None))
    asked = [task_of(prompt="bad"), task_of(), task_of(prompt="impossible"), task_of(2)]
    bad, good, impossible, also_good = await asyncio.gather(*(outcome_of(scheduler, one) for one in asked))
    assert isinstance(bad, Failed)
    assert "log says why" in bad.message
    assert isinstance(impossible, Failed)
    assert (impossible.message, impossible.wrong) == ("this cannot be", True)
    assert (good, also_good) == (Completed("old-1"), Completed("old-1"))


async def test_what_became_of_a_request_is_logged_under_its_id(schedulers: Schedulers, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = schedulers(loaded(spoil=lambda request: nan(request) if request.prompt == "bad" else None))
    with caplog.at_level(logging.INFO, "serve"):
        bad = await outcome_of(scheduler, task_of(prompt="bad", request_id="visit-7"))
        await outcome_of(scheduler, task_of(request_id="visit-8"))
    assert isinstance(bad, Failed)
    assert bad.message.endswith("the server's log says why, at request visit-7")
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("ERROR", "request visit-7: old-1: a picture failed: the UNet produced NaN") in lines
    assert ("INFO", "request visit-8: old-1: picture 0 is finished") in lines


async def test_a_store_of_adapters_that_fails_is_no_fault_of_the_picture(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(spoil=lambda request: StorageError("gs://secret could not be reached")))
    failed = await outcome_of(scheduler, task_of(adapter="waves/1"))
    assert isinstance(failed, Failed)
    assert failed.retry
    assert "secret" not in failed.message


def png() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(sink, "PNG")
    return sink.getvalue()


async def test_pictures_are_decoded_neither_by_the_engine_nor_by_the_event_loop(
    schedulers: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(task: GenerationTask) -> Any:
        threads.append(threading.current_thread().name)
        return requests_of(task)

    monkeypatch.setattr("serve.scheduler.requests_of", noted)
    main = loaded()
    assert await outcome_of(schedulers(main), task_of(2, image=png())) == Completed("old-1")
    assert len(threads) == 1
    assert threads[0] not in ("engine", threading.current_thread().name)
    first, second = main.engine.submitted  # type: ignore[attr-defined]
    assert first.image is second.image is not None
    assert (first.seed, second.seed) == (0, 1)


async def test_a_picture_of_one_channel_is_a_picture(schedulers: Schedulers) -> None:
    def red(request: Any) -> Image.Image:
        picture = Image.new("RGB", (16, 16))
        picture.putpixel((0, 0), (255, 0, 0))
        return picture

    assert await outcome_of(schedulers(loaded(spoil=red)), task_of()) == Completed("old-1")


async def test_a_flat_picture_is_never_handed_out(schedulers: Schedulers) -> None:
    assert isinstance(await outcome_of(schedulers(loaded(spoil=black)), task_of()), Failed)


async def test_an_engine_that_dies_fails_what_it_had_and_the_health_check(schedulers: Schedulers, monkeypatch: Any) -> None:
    main = loaded()
    scheduler = schedulers(main)
    monkeypatch.setattr(main.engine, "tick", lambda: 1 / 0)
    lost = await outcome_of(scheduler, task_of())
    assert isinstance(lost, Failed)
    assert lost.retry
    with pytest.raises(RuntimeError, match="engine's thread has ended"):
        scheduler.state()
    assert isinstance(await outcome_of(scheduler, task_of()), Failed)


async def test_an_engine_that_hangs_fails_the_health_check(monkeypatch: Any) -> None:
    main, hangs, now = loaded(), threading.Event(), [0.0]
    scheduler = Scheduler(main, LIMITS, Meters(), clock=lambda: now[0])
    monkeypatch.setattr(main.engine, "tick", lambda tick=main.engine.tick: (hangs.wait(30), tick())[1])
    asked = asyncio.create_task(outcome_of(scheduler, task_of()))
    try:
        await until(lambda: scheduler._ticking_since is not None)
        now[0] = 119
        scheduler.check_health()
        now[0] = 121
        for ask in (scheduler.check_health, scheduler.state):
            with pytest.raises(RuntimeError, match="the engine hangs: a tick has lasted 121 s, and 120 s is the most"):
                ask()
        now[0] = 1
        hangs.set()
        assert await asked == Completed("old-1")
        await until(lambda: scheduler._ticking_since is None)
        now[0] = 1000  # there is nothing to do
        scheduler.check_health()
    finally:
        hangs.set()
        await asyncio.to_thread(scheduler.close)


async def test_a_trace_tells_the_ticks(schedulers: Schedulers) -> None:
    painted = await outcome_of(schedulers(loaded()), task_of(2, steps=4, trace=True))
    assert isinstance(painted, Completed)
    assert [tick["rows"] for tick in painted.ticks][:4] == [2, 2, 2, 2]
    assert len(painted.ticks) == 4


# ---- promotion

TRIED = LIMITS.model_copy(update={"canary_s": 0.6})


async def painters(scheduler: Scheduler, seconds: float, steps: int = 3, enough: Callable[[], Any] = lambda: False) -> list[str]:
    """A load of four visitors for a while, or until it is enough; whose pictures they got."""
    end, got = time.monotonic() + seconds, []

    async def visitor() -> None:
        while time.monotonic() < end and not enough():
            events = await events_of(scheduler, task_of(1, steps=steps))
            assert isinstance(events[-1], Completed), events[-1]
            got.extend(event.checkpoint for event in events if isinstance(event, Picture))

    await asyncio.gather(*(visitor() for _ in range(4)))
    return got


async def test_a_good_checkpoint_takes_over_and_nobody_notices(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(), TRIED)
    load = asyncio.create_task(painters(scheduler, 1.5))
    await asyncio.sleep(0.2)
    scheduler.roll_out(loaded("new-2"))
    assert scheduler.state().trial == "new-2"
    got = await load
    share = got[: len(got) // 2].count("new-2") / (len(got) // 2)
    assert 0 < share < 0.8
    assert set(got[-4:]) == {"new-2"}
    await until(lambda: scheduler._rollout.retiring == [])
    assert (scheduler.state().checkpoint, scheduler.state().trial) == ("new-2", "")


@pytest.mark.parametrize("spoil", [nan, black])
async def test_a_checkpoint_that_paints_nothing_is_given_up_and_nobody_notices(schedulers: Schedulers, spoil: Any) -> None:
    scheduler = schedulers(loaded(), TRIED)
    rejected: list[str] = []
    scheduler.on_given_up = lambda one, problem: rejected.append(f"{one.id}: {problem}")
    load = asyncio.create_task(painters(scheduler, 1.0))
    await asyncio.sleep(0.1)
    scheduler.roll_out(loaded("new-2", spoil))
    assert set(await load) == {"old-1"}
    await until(lambda: rejected)
    assert len(rejected) == 1
    assert rejected[0].startswith("new-2: ")
    assert (scheduler.state().checkpoint, scheduler.state().trial) == ("old-1", "")


async def test_a_slow_checkpoint_is_given_up(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(tick_s=0.002), LIMITS)
    rejected: list[str] = []
    scheduler.on_given_up = lambda one, problem: rejected.append(problem)
    scheduler.roll_out(loaded("new-2", tick_s=0.03))
    await painters(scheduler, 20, enough=lambda: rejected)
    assert len(rejected) == 1
    assert "s a step" in rejected[0]


async def test_few_steps_are_not_compared_by_what_decoding_takes(schedulers: Schedulers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pictures of one step every tick decodes."""
    main, new = loaded(), loaded("new-2")
    tick = new.engine.tick

    def decoding() -> Any:
        events = tick()
        time.sleep(0.02 if events else 0)
        return events

    monkeypatch.setattr(new.engine, "tick", decoding)
    scheduler = schedulers(main, LIMITS)
    scheduler.roll_out(new)
    for _ in range(2 * ENOUGH_TICKS + 10):
        await outcome_of(scheduler, task_of(1, steps=1))
    assert scheduler.state().trial == "new-2"


@pytest.mark.parametrize("more", [{"adapter": "ada/1"}, {"image": png()}, {"reproducible": True}])
async def test_work_of_its_own_is_not_the_checkpoints_fault(
    schedulers: Schedulers, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """An adapter, say, is loaded once by each engine: the new one does it during its trial."""
    scheduler = schedulers(loaded(), LIMITS)
    rejected: list[str] = []
    scheduler.on_given_up = lambda one, problem: rejected.append(problem)
    new = loaded("new-2")
    tick = new.engine.tick

    def cold() -> Any:
        if new.running:
            time.sleep(0.02)
        return tick()

    monkeypatch.setattr(new.engine, "tick", cold)
    scheduler.roll_out(new)
    for _ in range(ENOUGH_TICKS + 5):
        assert isinstance(await outcome_of(scheduler, task_of(1, steps=3, **more)), Completed)
    assert rejected == []
    assert scheduler.state().trial == "new-2"


async def test_an_adapter_that_cannot_be_had_is_not_the_checkpoints_fault(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(), LIMITS)
    away = loaded("new-2", lambda request: StorageError("gs://secret is away") if request.adapter else None)
    scheduler.roll_out(away)
    assert await outcome_of(scheduler, task_of(adapter="waves/1")) == Completed("old-1")  # the first one is the new one's
    assert away.engine.submitted  # type: ignore[attr-defined]
    assert scheduler.state().trial == "new-2"


def counted(scheduler: Scheduler) -> str:
    """Pictures, outcomes and rollbacks in the metrics."""
    lines = scheduler._meters.text().splitlines()
    names = ("momalisa_pictures_total", "momalisa_outcomes_total", "momalisa_rollbacks_total")
    return "; ".join(line for line in lines if line.startswith(names))


async def test_without_visitors_a_checkpoint_paints_for_nobody_before_it_takes_over(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(), LIMITS.model_copy(update={"canary_s": 0.2, "steps": 4}))
    new = loaded("new-2")
    scheduler.roll_out(new)
    await until(lambda: scheduler.state().checkpoint == "new-2")
    painted = new.engine.submitted  # type: ignore[attr-defined]
    assert {request.prompt for request in painted} <= set(EVALUATION_PROMPTS)
    assert ENOUGH_PICTURES <= len(painted) <= 2 * ENOUGH_PICTURES
    assert counted(scheduler) == "momalisa_pictures_total 0.0; momalisa_rollbacks_total 0.0"


@pytest.mark.parametrize("spoil", [nan, black])
async def test_without_visitors_weights_that_paint_nothing_are_given_up(schedulers: Schedulers, spoil: Any) -> None:
    scheduler = schedulers(loaded(), LIMITS.model_copy(update={"canary_s": 0.2}))
    rejected: list[str] = []
    scheduler.on_given_up = lambda one, problem: rejected.append(one.id)
    scheduler.roll_out(loaded("new-2", spoil))
    await until(lambda: scheduler.state().trial == "")
    assert (scheduler.state().checkpoint, rejected) == ("old-1", ["new-2"])
    assert counted(scheduler) == "momalisa_pictures_total 0.0; momalisa_rollbacks_total 1.0"


async def test_time_alone_is_no_trial(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(), LIMITS.model_copy(update={"canary_s": 0.1}))
    new = loaded("new-2")
    new.engine.paused = True  # type: ignore[attr-defined]
    scheduler.roll_out(new)
    await asyncio.sleep(0.4)
    assert scheduler.state().trial == "new-2"
    new.engine.paused = False  # type: ignore[attr-defined]
    await until(lambda: scheduler.state().checkpoint == "new-2")


async def test_pictures_of_the_old_checkpoint_are_no_trial_of_the_new_one(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(), LIMITS.model_copy(update={"canary_s": 0.1, "canary_share": 0.0}))
    new = loaded("new-2")
    new.engine.paused = True  # type: ignore[attr-defined]
    scheduler.roll_out(new)
    got = await asyncio.wait_for(painters(scheduler, 0.4), 20)
    assert len(got) > ENOUGH_PICTURES
    assert scheduler.state().trial == "new-2"


def test_steps_of_the_main_checkpoint_alone_are_what_a_new_one_is_compared_with() -> None:
    main, challenger, new, canary = loaded("a"), loaded("b"), loaded("c"), Canary(0.5, 60)
    rollout, sample = Rollout(main, challenger), sample_of(LIMITS, 0, 0.0)
    rollout.start(new, canary)
    for old, problem in ((challenger, ""), (main, "0.100 s a step, 0.010 s before")):
        for _ in range(ENOUGH_TICKS):
            rollout.note_tick(old, [sample], 2, 0.01)
            rollout.note_tick(new, [sample], 2, 0.1)
        assert canary.problem == problem


async def test_a_checkpoint_that_visitors_never_get_is_tried_among_them(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(), LIMITS.model_copy(update={"canary_s": 0.1, "canary_share": 0.0, "steps": 2}))
    long = asyncio.create_task(outcome_of(scheduler, task_of(1, steps=100_000, deadline_s=1e6)))
    await until(lambda: scheduler._rollout.main.running)
    scheduler.roll_out(loaded("new-2"))
    await until(lambda: scheduler.state().checkpoint == "new-2")
    assert not long.done()
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)


async def test_a_full_line_of_pictures_of_one_row_does_not_keep_a_trial_from_ending(schedulers: Schedulers) -> None:
    """They end one at a time, and a rehearsal takes two rows."""
    limits = LIMITS.model_copy(update={"canary_s": 0.1, "canary_share": 0.0, "steps": 2})
    main, end = loaded(tick_s=0.005), time.monotonic() + 10
    main.engine.paused = True  # type: ignore[attr-defined]
    scheduler = schedulers(main, limits)

    async def visitor(steps: int) -> None:
        while scheduler.state().checkpoint == "old-1":
            assert time.monotonic() < end, "the trial never ends"
            assert isinstance(await outcome_of(scheduler, task_of(1, steps=steps)), Completed)
            steps = 4

    visitors = [asyncio.create_task(visitor(steps)) for steps in (1, 2, 3, 4, *[4] * 8)]
    await until(lambda: scheduler.state().waiting == 8)
    main.engine.paused = False  # type: ignore[attr-defined]
    scheduler.roll_out(loaded("new-2"))
    await asyncio.gather(*visitors)


async def test_a_long_request_ends_on_the_weights_it_began_with(schedulers: Schedulers) -> None:
    old = loaded(tick_s=0.01)
    scheduler = schedulers(old, LIMITS.model_copy(update={"canary_s": 0}))
    long = asyncio.create_task(events_of(scheduler, task_of(4, steps=50)))
    await until(lambda: len(old.running) == 4)
    scheduler.roll_out(loaded("new-2"))
    await until(lambda: scheduler.state().checkpoint == "new-2")
    assert {event.checkpoint for event in await long if isinstance(event, Picture)} == {"old-1"}
    assert await outcome_of(scheduler, task_of()) == Completed("new-2")


async def test_a_pointer_moved_back_ends_the_trial(schedulers: Schedulers) -> None:
    scheduler = schedulers(loaded(), LIMITS)
    rejected: list[str] = []
    scheduler.on_given_up = lambda one, problem: rejected.append(problem)
    new = loaded("new-2", tick_s=0.01)
    scheduler.roll_out(new)
    long = [asyncio.create_task(outcome_of(scheduler, task_of(1, steps=300))) for _ in range(4)]
    await until(lambda: len(new.running) >= 2)
    scheduler.abort_rollout("refs/best was moved back")
    assert await asyncio.gather(*long) == [Completed("old-1")] * 4
    assert rejected == []
    assert len(new.engine.cancelled) >= 2  # type: ignore[attr-defined]  # it draws no further for nobody
    assert "momalisa_rollbacks_total 0.0" in counted(scheduler)
