"""Every sampler and mode equals diffusers' own pipeline with the same seed, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from momalisa.engine import SAMPLERS, Done, Engine, Request, Sampler
from tests.engine.conftest import Peer, difference, half_mask, photograph

REQUEST = Request("a red boat on a blue sea", seed=7, steps=5, guidance_scale=5.0, size_px=64)
TO_IMAGE = {"text": {}, "image": {"image": photograph(1)}, "mask": {"image": photograph(1), "mask": half_mask()}}


@pytest.mark.parametrize("mode", TO_IMAGE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_alone(engine: Engine, by_diffusers: Peer, sampler: Sampler, mode: str) -> None:
    for changes in ({}, {"steps": 17, "strength": 0.35, "guidance_scale": 1.0}):
        request = replace(REQUEST, sampler=sampler, **TO_IMAGE[mode], **changes)  # type: ignore[arg-type]
        assert difference(engine.generate([request])[0], by_diffusers(request)) <= 1, request


@pytest.mark.parametrize("mode", ["image", "mask"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_full_strength(engine: Engine, by_diffusers: Peer, sampler: Sampler, mode: str) -> None:
    request = replace(REQUEST, sampler=sampler, strength=1.0, **TO_IMAGE[mode])  # type: ignore[arg-type]
    assert difference(engine.generate([request])[0], by_diffusers(request)) <= 1


REQUESTS = st.builds(
    Request,
    prompt=st.sampled_from(["a red boat", "a tree in winter", ""]),
    seed=st.integers(0, 2**64 - 1),
    steps=st.integers(1, 8),
    guidance_scale=st.sampled_from([1.0, 2.0, 7.5]),
    negative_prompt=st.sampled_from(["", "green"]),
    size_px=st.sampled_from([64, 64, 96]),
    sampler=st.sampled_from(SAMPLERS),
    strength=st.floats(0, 1),
    reproducible=st.booleans(),
).flatmap(
    lambda request: st.sampled_from(
        [
            request,
            replace(request, image=photograph(request.seed, request.size_px)),
            replace(request, image=photograph(request.seed, request.size_px), mask=half_mask(request.size_px)),
        ]
    )
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=st.lists(st.tuples(st.integers(0, 6), REQUESTS.filter(lambda r: r.start < r.steps)), min_size=2, max_size=6))
def test_any_mix_of_arrivals(engine: Engine, by_diffusers: Peer, arrivals: list[tuple[int, Request]]) -> None:
    asked, pictures, ticks = {}, {}, 0
    line = sorted(arrivals, key=lambda arrival: arrival[0])
    while line or not engine.idle:
        while line and line[0][0] <= ticks:
            request = line.pop(0)[1]
            asked[engine.submit(request)] = request
        for event in engine.tick():
            assert isinstance(event, Done)
            pictures[event.id] = event.picture
        ticks += 1
    assert pictures.keys() == asked.keys()
    assert engine.rows == engine.pending_row_steps == 0
    for number, request in asked.items():
        assert difference(pictures[number], by_diffusers(request)) <= 1, request
