"""A generator exists only when it can paint."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from momalisa import checkpoint
from momalisa.checkpoint import NoCheckpoint
from momalisa.config import Settings
from momalisa.engine import Engine, Request
from momalisa.storage import Store
from serve.app import ServeArgs, application, build, load_settings
from serve.replica import Generator, device
from serve.task import Completed, GenerationTask
from tests.checkpoint.test_text_adapters import published
from tests.engine.conftest import difference
from tests.serve.test_scheduler import until

ROOT = Path(__file__).parents[2]


def test_weights_that_were_changed_are_never_served(settings: Settings, tmp_path: Path) -> None:
    root = shutil.copytree(settings.root, tmp_path / "copy")
    weights = next((root / "checkpoints").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"its manifest says"):
        Generator(settings.model_copy(update={"root": str(root)}), "checkpoints/tiny/64")


def test_a_checkpoint_that_is_not_there(settings: Settings) -> None:
    with pytest.raises(NoCheckpoint, match=r"checkpoints/tiny/65 holds no complete checkpoint"):
        Generator(settings, "checkpoints/tiny/65")


def test_nothing_promoted_fails_the_deployment_and_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match="run the promote job first"):
        build(ServeArgs(overrides=[f"--root={tmp_path}"]))


def test_relative_paths_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(ServeArgs()).root == str(ROOT / "out/demo")
    (tmp_path / "own.yaml").write_text("root: mine\n")
    monkeypatch.setenv("MOMALISA_HOME", str(tmp_path))
    assert load_settings(ServeArgs(config="own.yaml")).root == str(tmp_path / "mine")
    assert load_settings(ServeArgs(config="own.yaml", overrides=["--root=gs://b/m"])).root == "gs://b/m"


def test_a_replica_has_the_gpu_that_ray_gave_it_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve.replica.ray.is_initialized", lambda: True)
    monkeypatch.setattr("serve.replica.ray.get_gpu_ids", lambda: ["3"])
    assert device() == "cuda"
    monkeypatch.setattr("serve.replica.ray.get_gpu_ids", list)
    assert device() == "cpu"
    assert not caplog.records
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device() == "cpu"
    assert "set num_gpus in its ray_actor_options" in caplog.text


@pytest.mark.parametrize("gpus", [0.0, 0.5, 1.0])
def test_a_replica_asks_for_the_gpus_it_is_said_to(settings: Settings, gpus: float) -> None:
    (generator, _) = application(settings, gpus)._bound_deployment.init_args
    assert generator._bound_deployment.ray_actor_options["num_gpus"] == gpus


@pytest.mark.slow
@pytest.mark.integration
def test_ray_shows_gpus_to_all_and_gives_them_to_those_that_ask() -> None:
    """Ray believes in one GPU."""
    driver = """
import logging, ray
from serve.replica import device
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         object_store_memory=200 * 2**20)
print(device(), *ray.get([ray.remote(num_cpus=0.5, num_gpus=gpus)(device).remote() for gpus in (1, 0, 0.5)]))
ray.shutdown()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    done = subprocess.run([sys.executable, "-c", driver], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-4:] == ["cpu", "cuda", "cpu", "cuda"]


async def test_without_a_compiler_pictures_come_and_the_state_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", compile_)
    serve = settings.serve.model_copy(update={"compile": True})
    generator = Generator(settings.model_copy(update={"serve": serve}))
    try:
        assert (await generator.state()).problem == "tiny-64 is drawn without torch.compile"
        last = [event async for event in generator.generate(GenerationTask("x", (0,), 2, 1.0, 64))][-1]
        assert last == Completed("tiny-64")
    finally:
        await asyncio.to_thread(generator.close)


@pytest.mark.parametrize("compiled", [True, False])
async def test_of_two_checkpoints_the_main_one_is_drawn_without_a_compiler_or_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """Whichever was loaded last."""
    answers, problem = iter([compiled, not compiled]), {True: "", False: "tiny-64 is drawn without torch.compile"}
    monkeypatch.setattr(Engine, "compile", lambda *_: next(answers))
    serve = settings.serve.model_copy(update={"compile": True, "canary_s": 0})
    generator = Generator(settings.model_copy(update={"serve": serve}))
    try:
        new = await asyncio.to_thread(generator._load, "checkpoints/tiny/64")
        assert (await generator.state()).problem == problem[compiled]
        generator._scheduler.roll_out(new)
        await until(lambda: generator._scheduler._rollout.main is new)
        assert (await generator.state()).problem == problem[not compiled]
    finally:
        await asyncio.to_thread(generator.close)


async def test_a_trace_tells_the_ticks_that_a_task_took_part_in(generator: Generator) -> None:
    """Sizes take turns: what is spent on the other one is not told."""
    asked = [GenerationTask("x", (0,), steps, 1.0, size_px, trace=True) for steps, size_px in ((30, 64), (20, 96))]

    async def outcome(task: GenerationTask) -> Completed:
        last = [event async for event in generator.generate(task)][-1]
        assert isinstance(last, Completed)
        return last

    traces = [outcome.ticks for outcome in await asyncio.gather(*map(outcome, asked))]
    assert [len(trace) for trace in traces] == [30, 20]


def test_what_is_served_has_the_checkpoint_s_text_encoder_and_its_threads(settings: Settings, tmp_path: Path) -> None:
    store, found = published(Path(checkpoint.read_best(Store(settings.root)).diffusion.model), tmp_path)
    serve = settings.serve.model_copy(update={"threads": 2, "max_adapters": 3})
    threads = torch.get_num_threads()
    generator = Generator(settings.model_copy(update={"root": store.root, "serve": serve}), found.path)
    try:
        assert torch.get_num_threads() == 2
        engine = generator._scheduler._rollout.main.engine
        text_encoder = checkpoint.load_text_encoder(store, found)
        expected = Engine.load(found.diffusion, checkpoint.load_unet(store, found), text_encoder=text_encoder)
        request = Request("a red boat", seed=3, steps=2, size_px=64)
        assert difference(engine.generate([request])[0], expected.generate([request])[0]) <= 1
        assert difference(engine.generate([request])[0], Engine.load(found.diffusion, engine.unet).generate([request])[0]) > 1
        assert engine._adapters is not None
        assert engine._adapters._most == 3
    finally:
        generator.close()
        torch.set_num_threads(threads)
