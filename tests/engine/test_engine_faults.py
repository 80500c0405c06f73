"""What goes wrong with one request, or with the device, is the end of that and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from momalisa.config import Diffusion
from momalisa.engine import Broken, Done, Engine, Event, GenerationError, Preview, Request
from momalisa.engine.batch import Batch
from momalisa.engine.preview import Projection
from tests.engine.conftest import difference, photograph

REQUEST = Request("a red boat on a blue sea", seed=7, steps=4, guidance_scale=5.0, size_px=64)


def finish(engine: Engine, every_tick: Callable[[], Any] = lambda: None) -> dict[int, Event]:
    """The last event of each request."""
    last: dict[int, Event] = {}
    while not engine.idle:
        for event in engine.tick():
            assert not isinstance(last.get(event.id), Done | Broken), "spoken of after its last event"
            last[event.id] = event
        every_tick()
    return last


def refuse(*args: Any, **kwargs: Any) -> None:
    raise torch.OutOfMemoryError("no memory")


def test_nan_breaks_its_own_request_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = engine.generate([REQUEST])
    forward = engine.unet.forward

    def poisoned(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        (output,) = forward(sample, *args, **kwargs)
        output[0] = math.nan  # the first picture's conditional row
        return (output,)

    monkeypatch.setattr(engine.unet, "forward", poisoned)
    bad, good = engine.submit(replace(REQUEST, seed=8)), engine.submit(REQUEST)
    events = finish(engine)
    broken, done = events[bad], events[good]
    assert isinstance(broken, Broken)
    assert isinstance(broken.error, GenerationError)
    assert "the UNet produced NaN or infinity (seed 8)" in str(broken.error)
    assert isinstance(done, Done)
    assert difference(done.picture, alone) <= 1


def test_an_autoencoder_that_overflows_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.autoencoder, "decode", lambda latents: torch.full((len(latents), 3, 64, 64), math.inf))
    with pytest.raises(GenerationError, match="the autoencoder produced"):
        engine.generate([REQUEST])
    assert engine.idle


@pytest.mark.parametrize("part", ["unet.forward", "autoencoder.vae.decode", "autoencoder.vae.encode"])
def test_a_device_that_refuses_breaks_what_it_was_doing(engine: Engine, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    owner, name = part.rsplit(".", 1)
    holder = engine
    for step in owner.split("."):
        holder = getattr(holder, step)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, refuse)
        ids = [engine.submit(replace(REQUEST, image=photograph(1))), engine.submit(replace(REQUEST, image=photograph(2)))]
        events = finish(engine)
    assert all(isinstance(events[number], Broken) for number in ids)
    assert engine.rows == 0
    assert engine.generate([REQUEST])[0].size == (64, 64)


def test_memory_that_runs_out_between_two_steps_breaks_what_was_drawn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "latents", refuse)
        number = engine.submit(REQUEST)
        events = finish(engine)
    assert isinstance(events[number], Broken)
    assert engine.generate([REQUEST])[0].size == (64, 64)


@pytest.mark.parametrize("part", ["__init__", "pictures"])
def test_a_device_that_refuses_a_preview_leaves_the_picture(engine: Engine, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """In the first preview's fit to the autoencoder, or in a preview's own product."""
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_projection", None)
        patch.setattr(Projection, part, refuse)
        number = engine.submit(replace(REQUEST, previews=2))
        events = [event for _ in range(REQUEST.steps) for event in engine.tick()]
    assert [type(event) for event in events] == [Done]
    assert (events[0].id, engine.idle) == (number, True)
    engine.submit(replace(REQUEST, previews=2))
    assert [type(event) for _ in range(REQUEST.steps) for event in engine.tick()] == [Preview, Preview, Done]


@pytest.mark.parametrize("after", range(7))
def test_a_cancelled_request_is_gone_and_its_neighbour_is_not_touched(engine: Engine, after: int) -> None:
    (alone,) = engine.generate([REQUEST])
    doomed, kept = engine.submit(replace(REQUEST, steps=5, previews=5)), engine.submit(REQUEST)
    seen: list[Event] = []
    for _ in range(after):
        seen += engine.tick()
    finished = any(isinstance(event, Done) and event.id == doomed for event in seen)
    assert engine.cancel(doomed) is not finished
    assert engine.cancel(doomed) is False
    rows = engine.rows
    assert rows in (0, 2)
    after_cancel = finish(engine)
    assert doomed not in after_cancel
    done = after_cancel.get(kept) or next(event for event in seen if event.id == kept)
    assert isinstance(done, Done)
    assert difference(done.picture, alone) <= 1


def test_cancelled_rows_are_not_in_the_next_tick(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = engine.unet.forward
    monkeypatch.setattr(engine.unet, "forward", lambda sample, *a, **k: (rows.append(len(sample)), forward(sample, *a, **k))[1])
    first, second = engine.submit(REQUEST), engine.submit(replace(REQUEST, guidance_scale=1.0))
    engine.tick()
    engine.cancel(first)
    engine.tick()
    engine.cancel(second)
    assert engine.idle
    assert rows == [3, 1]
    assert not engine.cancel(12345)


def test_the_batch_is_never_wider_than_max_rows_and_goes_first_come_first_served(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = engine.unet.forward
    monkeypatch.setattr(engine.unet, "forward", lambda sample, *a, **k: (rows.append(len(sample)), forward(sample, *a, **k))[1])
    ids = [engine.submit(replace(REQUEST, seed=seed, steps=2)) for seed in range(9)]
    assert engine.pending_row_steps == 9 * 2 * 2
    order = list(finish(engine))
    assert order == ids
    assert rows == [8, 8, 8, 8, 2, 2]


def test_a_late_request_joins_the_running_batch(engine: Engine) -> None:
    early = engine.submit(replace(REQUEST, steps=6))
    engine.tick()
    late = engine.submit(replace(REQUEST, steps=2))
    events: list[Event] = []
    while not any(event.id == late for event in events):
        events += engine.tick()
    assert engine.rows == 2
    assert not any(event.id == early for event in events)
    finish(engine)


def test_sizes_take_turns(engine: Engine) -> None:
    large, small = engine.submit(replace(REQUEST, steps=6, size_px=96)), engine.submit(replace(REQUEST, steps=2))
    order = [event.id for _ in range(20) for event in engine.tick()]
    assert order == [small, large]


def test_previews_are_spread_over_the_steps_and_look_like_the_end(diffusion: Diffusion) -> None:
    engine = Engine.load(Diffusion(model="miniature://diffusion"))
    number = engine.submit(
        Request("A MOMA artwork of: a red circle on a blue ground", steps=12, guidance_scale=3.0, size_px=128, previews=3)
    )
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()
    previews, (done,) = [e for e in events if isinstance(e, Preview)], [e for e in events if isinstance(e, Done)]
    assert [(event.id, event.done, event.total) for event in previews] == [(number, 3, 12), (number, 6, 12), (number, 9, 12)]
    final = np.asarray(done.picture, np.float32).ravel()
    likeness = [float(np.corrcoef(np.asarray(event.picture, np.float32).ravel(), final)[0, 1]) for event in previews]
    assert all(event.picture.size == (128, 128) for event in previews)
    assert likeness == sorted(likeness)
    assert likeness[-1] > 0.9


@pytest.mark.parametrize(("steps", "wanted", "expected"), [(1, 3, []), (2, 1, [1]), (20, 3, [5, 10, 15]), (3, 9, [1, 2])])
def test_when_previews_come(engine: Engine, steps: int, wanted: int, expected: list[int]) -> None:
    engine.submit(replace(REQUEST, steps=steps, previews=wanted, guidance_scale=1.0))
    seen: list[Event] = []
    while not engine.idle:
        seen += engine.tick()
    assert [event.done for event in seen if isinstance(event, Preview)] == expected


def test_generate_leaves_the_events_of_others_for_the_next_tick(engine: Engine) -> None:
    other = engine.submit(replace(REQUEST, steps=1))
    engine.generate([REQUEST])
    assert not engine.idle
    assert [event.id for event in engine.tick()] == [other]
    assert engine.idle


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
def test_reproducible_is_bit_by_bit_the_same_in_any_mix(diffusion: Diffusion, half: torch.dtype) -> None:
    engine = Engine.load(diffusion, dtype=half, max_rows=8)
    request = replace(REQUEST, reproducible=True, image=photograph(3), previews=1)
    (alone,) = engine.generate([request])
    for seed, size in ((1, 64), (2, 96)):
        crowd = [replace(REQUEST, seed=seed + index, size_px=size, steps=3 + index) for index in range(4)]
        pictures = engine.generate([*crowd, request, replace(request, seed=9), *crowd])
        assert pictures[4].tobytes() == alone.tobytes()


def test_a_guidance_interval_saves_rows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = engine.unet.forward
    monkeypatch.setattr(engine.unet, "forward", lambda sample, *a, **k: (rows.append(len(sample)), forward(sample, *a, **k))[1])
    request = replace(REQUEST, steps=8, guidance_interval=(0.5, 5.0))
    engine.submit(request)
    pending = engine.pending_row_steps
    finish(engine)
    assert rows == sorted(rows[:3]) + rows[3:]  # one row, then two, then one again
    assert (rows[0], rows[3], rows[-1]) == (1, 2, 1)
    assert sum(rows) == pending < 16


def test_max_rows_must_hold_a_guided_picture(diffusion: Diffusion) -> None:
    with pytest.raises(ValueError, match="max_rows=1 must be at least 2"):
        Engine.load(diffusion, max_rows=1)
