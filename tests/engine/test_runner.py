"""Compiled shapes: the same pictures, rows padded to buckets, and nothing compiled once requests are drawn."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from momalisa.config import Diffusion
from momalisa.engine import Engine, Request
from momalisa.engine.batch import Batch
from momalisa.engine.engine import _exact
from momalisa.engine.runner import Runner, _buckets, _padded
from tests.engine.conftest import difference, photograph

REQUEST = Request("a red boat", seed=7, steps=3, guidance_scale=5.0, size_px=64)


def test_buckets_end_at_the_most_rows() -> None:
    assert _buckets(2) == [1, 2]
    assert _buckets(20) == [1, 2, 4, 8, 12, 16, 20]


def test_padding_adds_rows_of_zeros() -> None:
    values = torch.ones(3, 2)
    assert _padded(values, 3) is values
    assert _padded(values, 5).tolist() == [[1, 1]] * 3 + [[0, 0]] * 2


def test_a_batch_goes_to_the_smallest_shape_it_fits(engine: Engine) -> None:
    runner, seen = Runner(engine.unet, torch.device("cpu"), torch.float32), []
    for rows in (4, 2, 8):

        def call(latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            seen.append((len(latents), len(timesteps), len(states)))
            return latents + 1

        runner._shapes[rows, 4, 8, 8] = call
    for rows in (1, 2, 3, 5):
        output = runner(torch.zeros(rows, 4, 8, 8), torch.zeros(rows), torch.zeros(rows, 77, 32))
        assert output.shape == (rows, 4, 8, 8)
        assert float(output.min()) == 1
    assert seen == [(2, 2, 2), (2, 2, 2), (4, 4, 4), (8, 8, 8)]


def test_what_has_no_shape_is_drawn_all_the_same(engine: Engine) -> None:
    runner = Runner(engine.unet, torch.device("cpu"), torch.float32)
    runner._shapes[1, 4, 8, 8] = None  # too few rows, and of another size
    assert runner(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 77, 32)).shape == (2, 4, 8, 8)
    assert runner(torch.zeros(1, 4, 12, 12), torch.zeros(1), torch.zeros(1, 77, 32)).shape == (1, 4, 12, 12)


@pytest.mark.slow
@pytest.mark.timeout(600)  # the C++ compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_nothing_is_compiled_while_pictures_are_drawn(diffusion: Diffusion, tmp_path: Path) -> None:
    engine, plain = Engine.load(diffusion, max_rows=2), Engine.load(diffusion, max_rows=2)
    assert engine.compile([64], tmp_path)
    assert [shape[0] for shape in engine._runner.shapes] == [1, 2]
    assert any(tmp_path.rglob("*.so"))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 2
    mixed = [
        REQUEST,
        replace(REQUEST, seed=8, guidance_scale=1.0, sampler="euler", steps=5),
        replace(REQUEST, image=photograph(1), sampler="unipc", steps=6),
        replace(REQUEST, seed=9, reproducible=True),
        replace(REQUEST, size_px=96),
    ]
    for ours, expected in zip(engine.generate(mixed), plain.generate(mixed), strict=True):
        assert difference(ours, expected) <= 1
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of torch.compile but the C++ compiler; and what would be compiled anew is an error."""
    compile_, set_stance = torch.compile, torch.compiler.set_stance
    monkeypatch.setattr(torch, "compile", lambda call, options, **more: compile_(call, backend="aot_eager", **more))
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: set_stance("fail_on_recompile"))


class Small(torch.nn.Module):
    """In a UNet's place: a few layers that are soon traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, latents: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        for layer in self.layers:
            latents = layer(latents).relu()
        return (latents,)


def small() -> Runner:
    return Runner(Small().eval(), torch.device("cpu"), torch.float32)


def warm(runner: Runner, rows: int) -> None:
    runner.warm(rows, [8], 4, torch.zeros(7, 3), None)


@torch.no_grad()
def right(runner: Runner, rows: int) -> bool:
    """Whether it draws what its model does."""
    latents = torch.rand(rows, 4, 8, 8)
    return torch.allclose(runner(latents, torch.zeros(rows), torch.zeros(rows, 7, 3)), runner.unet(latents)[0], atol=1e-5)


@pytest.mark.usefixtures("traced")
def test_more_shapes_than_torch_compile_keeps_of_one_function() -> None:
    runner = small()
    warm(runner, 64)
    assert len(runner.shapes) == 10
    assert all(right(runner, shape[0]) for shape in runner.shapes)


@pytest.mark.usefixtures("traced")
def test_one_draws_while_another_is_compiled_and_both_stay_compiled() -> None:
    first, second = small(), small()
    warm(first, 2)
    compiled, drawn = counters["stats"]["unique_graphs"], 0
    warming = threading.Thread(target=warm, args=(second, 16))
    warming.start()
    while warming.is_alive():
        assert right(first, 2)
        drawn += 1
    warming.join()
    assert drawn > 1
    assert len(second.shapes) == 6
    assert counters["stats"]["unique_graphs"] == compiled + 6
    assert right(first, 2)  # or an error: nothing may be compiled anew
    assert right(second, 16)


@pytest.mark.usefixtures("traced")
def test_what_was_compiled_goes_with_what_it_was_compiled_for() -> None:
    runner = small()
    warm(runner, 2)
    assert right(runner, 2)
    unet = weakref.ref(runner.unet)
    del runner
    gc.collect()
    assert unet() is None


class Buffers:
    """In a CUDA graph's place on a CPU: what goes in is copied into the example, and what comes out is a copy."""

    def __init__(self, call: Any, example: tuple[torch.Tensor, ...]) -> None:
        self.call, self.inputs = call, example

    def __call__(self, *values: torch.Tensor) -> torch.Tensor:
        for buffer, value in zip(self.inputs, values, strict=True):
            buffer.copy_(value)
        output: torch.Tensor = self.call(*self.inputs)
        return output.clone()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Buffers]:
    """What stands for a graph, in the order in which they are captured."""
    made: list[Buffers] = []

    def ready(_: Runner, call: Any, example: tuple[torch.Tensor, ...], pool: Any) -> Buffers:
        made.append(Buffers(call, example))
        return made[-1]

    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(Runner, "_ready", ready)
    return made


def test_the_inputs_of_graphs_are_nobody_elses(diffusion: Diffusion, captured: list[Buffers]) -> None:
    """Not the cached states of the empty prompt either, which are the example's: what is guided is guided away from them."""
    engine, plain = Engine.load(diffusion, max_rows=4), Engine.load(diffusion, max_rows=4)
    assert engine.compile([64])
    assert [len(graph.inputs[0]) for graph in captured] == [4, 2, 1]  # the largest first: the others fit into its memory
    empty = engine._texts.embed([""])[0].clone()
    for request in (replace(REQUEST, guidance_scale=1.0), REQUEST):
        assert difference(engine.generate([request])[0], plain.generate([request])[0]) <= 1
    assert torch.equal(captured[-1].inputs[2][0], engine._texts.embed([REQUEST.prompt])[0])
    assert torch.equal(engine._texts.embed([""])[0], empty)


def test_where_the_compiler_fails_pictures_are_drawn_without(
    diffusion: Diffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_(call: Any, **_: Any) -> Any:
        def called(latents: torch.Tensor, *more: torch.Tensor) -> Any:
            if len(latents) == 1:
                raise RuntimeError("Failed to find C compiler")
            return call(latents, *more)

        return called

    monkeypatch.setattr(torch, "compile", compile_)
    engine = Engine.load(diffusion, max_rows=2)
    assert not engine.compile([64])
    assert "Failed to find C compiler" in caplog.text
    assert engine._runner.shapes == []  # one row is not padded to two for the sake of those that were compiled
    assert difference(engine.generate([REQUEST])[0], Engine.load(diffusion, max_rows=2).generate([REQUEST])[0]) <= 1


def test_float32_on_a_gpu_is_not_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    _exact(torch.device("cuda"), torch.bfloat16)
    _exact(torch.device("cpu"), torch.float32)
    assert torch.backends.cudnn.allow_tf32
    _exact(torch.device("cuda"), torch.float32)
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
def test_a_graph_of_one_row_draws_what_plain_pytorch_does_and_what_is_guided_after_it_too(
    diffusion: Diffusion, tmp_path: Path
) -> None:
    engine, plain = (Engine.load(diffusion, device="cuda", max_rows=4) for _ in range(2))
    assert engine.compile([64], tmp_path)
    asked = [replace(REQUEST, guidance_scale=1.0), REQUEST, replace(REQUEST, seed=8, guidance_scale=1.0), REQUEST]
    for request in asked:  # shapes in any order: their graphs share their memory
        assert difference(engine.generate([request])[0], plain.generate([request])[0]) <= 1
    for ours, expected in zip(engine.generate(asked), plain.generate(asked), strict=True):
        assert difference(ours, expected) <= 1


@pytest.mark.gpu
def test_nothing_but_a_preview_s_pixels_waits_for_a_step(diffusion: Diffusion) -> None:
    engine = Engine.load(diffusion, device="cuda", max_rows=6)
    for seed in range(4):
        engine.submit(replace(REQUEST, seed=seed, steps=9, guidance_scale=1.0 + seed % 2))
    engine.tick()
    (lane,) = engine._lanes.values()
    batch: Batch = lane.batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.step(engine._runner)
        batch.estimate([0, 2])
        batch.drop([batch.trajectories[1].id])
        batch.step(engine._runner)
        batch.drop([one.id for one in batch.trajectories])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_one_engine_draws_on_where_there_is_no_memory_for_a_second(diffusion: Diffusion, tmp_path: Path) -> None:
    engine = Engine.load(diffusion, device="cuda", max_rows=4)
    assert engine.compile([64], tmp_path)
    (expected,) = engine.generate([REQUEST])
    torch.cuda.set_per_process_memory_fraction(0.0)  # of the GPU's: nothing beyond what the process has
    hoard: list[torch.Tensor] = []
    try:
        for size in (2**20, 2**14, 2**9):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    hoard.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        with pytest.raises(torch.OutOfMemoryError):
            Engine.load(diffusion, device="cuda", max_rows=4)
    finally:
        hoard.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert difference(engine.generate([REQUEST])[0], expected) <= 1
    assert Engine.load(diffusion, device="cuda", max_rows=4).compile([64], tmp_path)


@pytest.mark.gpu
def test_cuda_graphs_draw_the_same_pictures(diffusion: Diffusion, tmp_path: Path) -> None:
    engine = Engine.load(diffusion, device="cuda", max_rows=6)
    plain = Engine.load(diffusion, max_rows=6)
    assert engine.compile([64], tmp_path)
    mixed = [REQUEST, replace(REQUEST, seed=8, guidance_scale=1.0, previews=2), replace(REQUEST, image=photograph(1))]
    for ours, expected in zip(engine.generate(mixed), plain.generate(mixed), strict=True):
        assert difference(ours, expected) <= 3
