"""Training learns, resumes as if nothing had happened, and does not depend on the number of workers."""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import Checkpoint, averages
from momalisa.config import Diffusion, Train
from momalisa.storage import Store
from momalisa.training import loop
from momalisa.training.batches import Pass
from momalisa.training.cache import LatentCache
from momalisa.training.loop import Diverged, Events, Run, Trainer
from momalisa.training.processes import accelerator

TRAIN = Train(
    images=48,
    batch=8,
    workers=1,
    precision="fp32",
    learning_rate=3e-3,
    warmup_images=16,
    schedule="cosine",
    ema_decay=0.8,
    checkpoint_every_images=24,
    evaluate_every_steps=4,
)


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> Run:
    """Eleven works of 4x4 latents: an epoch ends inside a batch."""
    source = torch.Generator().manual_seed(5)
    mean, log_variance = torch.randn((11, 4, 4, 4), generator=source), torch.full((11, 4, 4, 4), -4.0)
    token_ids = torch.randint(0, 600, (11, 77), generator=source)
    names = [f"work-{i}" for i in range(11)]
    cache = LatentCache(names, names, torch.cat([mean, log_variance], dim=1).half(), token_ids)
    return Run("tiny-0", TRAIN, Diffusion(model=str(tiny_base)), cache, Store(str(tmp_path / "store")), {"encoder_id": "x"})


def changed(run: Run, **settings: Any) -> Run:
    return replace(run, train=Train(**{**run.train.model_dump(), **settings}))


def state_of(run: Run, checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: run.store.read_bytes(f"{checkpoint.path}/state/{name}") for name in checkpoint.state}


def test_the_loss_falls(run: Run) -> None:
    seen: list[dict[str, float]] = []
    long = changed(run, images=960, checkpoint_every_images=10_000, evaluate_every_steps=10_000, learning_rate=5e-3)
    progress = Trainer(long, Events(logged=seen.append)).train()
    losses = [metrics["loss"] for metrics in seen]
    assert [metrics["images_seen"] for metrics in seen] == list(range(80, 961, 80))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert progress.losses == [(int(metrics["images_seen"]), metrics["loss"]) for metrics in seen]


def test_what_is_heard_and_written(run: Run) -> None:
    heard: list[Any] = []
    events = Events(
        checkpointed=lambda checkpoint: heard.append(("checkpoint", checkpoint.images_seen)),
        pictures_due=lambda images_seen, unet, text_encoder: heard.append(("pictures", images_seen, unet.training)),
        synchronise=lambda metrics: heard.append(("synchronise", metrics["images_seen"])),
    )
    trainer = Trainer(run, events)
    rates = []
    step = trainer.step
    trainer.step = lambda: (step(), rates.append(trainer._bare_optimizer.param_groups[0]["lr"]))[0]  # type: ignore[method-assign]
    trainer.train()
    assert [what for what in heard if what[0] != "checkpoint"] == [
        ("synchronise", 24),
        ("pictures", 32, False),
        ("pictures", 48, False),
        ("synchronise", 48),
    ]
    assert [what for what in heard if what[0] == "checkpoint"] == [("checkpoint", 24), ("checkpoint", 48)]
    assert heard.index(("checkpoint", 48)) < heard.index(("synchronise", 48))  # the last one is waited for
    assert trainer.bare.unet.training
    cosine = [0.5 * (1 + math.cos(math.pi * seen / 48)) for seen in range(0, 48, 8)]
    assert rates == pytest.approx([3e-3 * warm * c for warm, c in zip([0.5, 1, 1, 1, 1, 1], cosine, strict=True)])
    first, last = checkpoints.read_all(run.store, run.name)
    assert (first.path, first.base["model"]) == ("checkpoints/tiny-0/000000024", run.diffusion.model)
    assert last.training["encoder_id"] == "x"
    assert last.training["settings"]["batch"] == 8
    assert [entry[0] for entry in last.training["losses"]] == [24, 48]
    unet = checkpoints.load_unet(run.store, last)  # the average, not the last weights
    for name, value in unet.named_parameters():
        assert torch.equal(value, trainer.ema.shadow[name]), name
    assert any(not torch.equal(value, trainer.trained[name]) for name, value in unet.named_parameters())


def scaled(settings: Train, workers: int) -> Accelerator:
    """As in fp16 on a GPU: the loss is multiplied, by twice as much after every second step."""
    found = accelerator(settings, workers)
    found.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    return found


def test_the_scale_of_the_loss_is_resumed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "accelerator", scaled)
    whole = Trainer(run, Events()).train()
    assert whole.scaler is not None
    assert (whole.scaler["scale"], whole.scaler["_growth_tracker"]) == (32.0, 0)  # after six steps
    shutil.copytree(run.store.root, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / run.name / "000000048")
    resumed = Trainer(replace(run, store=Store(str(tmp_path / "again"))), Events())
    assert resumed.accelerator.scaler.state_dict() == {**whole.scaler, "scale": 8.0, "_growth_tracker": 1}  # after three
    assert resumed.train() == whole


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"power_ema": True}], ids=str)
def test_interrupted_and_resumed_is_uninterrupted_bit_by_bit(run: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    run = changed(run, **options)
    whole = Trainer(run, Events()).train()

    def killed(checkpoint: Checkpoint) -> None:
        raise KeyboardInterrupt

    again = replace(run, store=Store(str(tmp_path / "again")))
    with pytest.raises(KeyboardInterrupt):
        Trainer(again, Events(checkpointed=killed)).train()
    trainer = Trainer(again, Events())
    assert trainer.progress.images_seen == 24
    assert trainer.train() == whole
    (_, expected), (_, found) = (checkpoints.read_all(part.store, run.name) for part in (run, again))
    assert found.files == expected.files  # EMA weights, by hash
    assert found.state == expected.state  # weights, EMA, Adam moments, progress, losses
    assert found.training == expected.training
    snapshots = [averages.read_all(part.store, run.name) for part in (run, again)]
    assert snapshots[0] == snapshots[1]  # by hash
    assert [one.images_seen for one in snapshots[0]] == ([24, 48] if run.train.power_ema else [])


def test_a_finished_run_has_nothing_to_do(run: Run) -> None:
    whole = Trainer(run, Events()).train()
    trainer = Trainer(run, Events())
    trainer.step = lambda: pytest.fail("a step too many")  # type: ignore[method-assign]
    assert trainer.train() == whole


def test_a_corrupted_state_is_passed_over(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Trainer(run, Events()).train()
    first, last = checkpoints.read_all(run.store, run.name)
    states = state_of(run, last)
    run.store.write_bytes(f"{last.path}/state/trainer.safetensors", b"noise")
    trainer = Trainer(run, Events())
    assert trainer.progress.images_seen == first.images_seen
    assert f"{last.path}/state/trainer.safetensors has sha256" in capsys.readouterr().out
    assert trainer.train() == whole
    assert state_of(run, checkpoints.read_all(run.store, run.name)[-1]) == states


def test_lora_trains_its_adapters_and_nothing_else(run: Run) -> None:
    trainer = Trainer(changed(run, lora_rank=2, images=24), Events())
    before = {name: value.clone() for name, value in trainer.bare.unet.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.bare.unet.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(trainer.trained)
    assert all("lora" in name for name in moved)
    saved = checkpoints.read_all(run.store, run.name)[-1]
    assert saved.lora
    assert list(saved.files) == [checkpoints.LORA_FILE]


def test_all_weights_move_in_a_full_fine_tune(run: Run) -> None:
    trainer = Trainer(changed(run, images=24), Events())
    before = {name: value.detach().clone() for name, value in trainer.trained.items()}
    trainer.train()
    assert set(before) == {name for name, _ in trainer.bare.unet.named_parameters()}
    still = [name for name, value in trainer.trained.items() if torch.equal(value, before[name])]
    assert not still


def test_a_loss_that_is_no_number_ends_the_run_and_the_last_checkpoint_stands(run: Run) -> None:
    trainer = Trainer(run, Events())
    loss = trainer.loss

    def broken(part: Pass) -> torch.Tensor:
        return loss(part) * (math.nan if trainer.progress.images_seen >= 40 else 1)

    trainer.loss = broken  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"the loss is nan after 40 images.*lower train.learning_rate") as caught:
        trainer.train()
    assert all(work in str(caught.value) for work in Trainer(run, Events()).batches.ids(40))
    assert [found.images_seen for found in checkpoints.read_all(run.store, run.name)] == [24]
    assert Trainer(run, Events()).train().images_seen == 48


@pytest.mark.parametrize("step", [16, 40], ids="after {} images".format)
def test_a_gradient_that_is_no_number_ends_the_run_before_a_checkpoint_is_made(run: Run, step: int) -> None:
    """The losses are all finite; the weights are not any more when the checkpoint of this step is due."""
    trainer = Trainer(run, Events())
    loss, weight = trainer.loss, next(iter(trainer.trained.values()))

    def steep(part: Pass) -> torch.Tensor:
        return loss(part) + ((weight.sum() * 0).sqrt() if trainer.progress.images_seen == step else 0)

    trainer.loss = steep  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=rf"the norm of the gradient is nan after {step} images \(loss: \d.*lower train.learning_"):
        trainer.train()
    assert any(not value.isfinite().all() for value in trainer.trained.values())
    assert [found.images_seen for found in checkpoints.read_all(run.store, run.name)] == ([24] if step == 40 else [])
    assert Trainer(run, Events()).train().images_seen == 48


def test_a_loss_that_explodes_ends_the_run_too(run: Run) -> None:
    """Ten times the usual, or ten where the usual is less: what comes before is an unlucky batch."""
    for factor, explodes in ((4.0, False), (1000.0, True)):
        one = changed(replace(run, name=f"by-{factor:g}"), learning_rate=1e-6)
        trainer = Trainer(one, Events())
        loss = trainer.loss

        def larger(
            part: Pass, trainer: Trainer = trainer, loss: Callable[[Pass], torch.Tensor] = loss, factor: float = factor
        ) -> torch.Tensor:
            return loss(part) * (factor if trainer.progress.images_seen == 40 else 1)

        trainer.loss = larger  # type: ignore[method-assign]
        if explodes:
            with pytest.raises(Diverged, match=r"the loss is \d+.* after 40 images \(usual: \d\.\d+\)"):
                trainer.train()
            assert [found.images_seen for found in checkpoints.read_all(one.store, one.name)] == [24]
        else:
            assert trainer.train().images_seen == 48


def test_accumulation_and_checkpointing_of_gradients_change_no_gradient(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at where they are clipped: Adam hardly minds their scale, so losses alone would not tell."""
    found: list[list[torch.Tensor]] = []

    def clip(parameters: Iterable[torch.nn.Parameter], limit: float) -> torch.Tensor:
        found.append([value.grad.clone() for value in parameters if value.grad is not None])
        return torch.zeros(())

    losses = []
    for settings in ({}, {"micro_batch": 2}, {"gradient_checkpointing": True}):
        trainer = Trainer(changed(run, **settings), Events())
        monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", clip)
        losses.append(float(trainer.step()))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(same, one, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)  # the C++ compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_steps_have_the_losses_of_eager_ones(run: Run, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    run = changed(run, checkpoint_every_images=8)  # each step's loss is looked at
    eager = Trainer(run, Events()).train()
    counters.clear()
    again = replace(run, store=Store(str(tmp_path / "compiled")))
    compiled = Trainer(changed(again, compile=True), Events()).train()
    assert counters["stats"]["unique_graphs"] == 1  # the whole UNet, once
    assert not counters["graph_break"]
    assert [loss for _, loss in compiled.losses] == pytest.approx([loss for _, loss in eager.losses], rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_more_than_eight_shapes_are_compiled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own limit is eight, beyond which it goes on uncompiled. What is traced is not made into C++ here."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    moments = [torch.randn(8, 4, 4 * (1 + index)).half() for index in range(11)]
    wide = replace(run, cache=replace(run.cache, moments=moments))
    counters.clear()
    Trainer(changed(wide, compile=True, batch=2, cell=1, images=12), Events()).train()
    assert counters["stats"]["unique_graphs"] >= 10  # twelve of eleven works, each of a shape of its own


def test_another_seed_is_another_run_of_chance(run: Run) -> None:
    losses = [Trainer(changed(replace(run, name=f"s{seed}"), images=8, seed=seed), Events()).train().losses for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_workers_that_would_train_apart_are_refused() -> None:
    with pytest.raises(RuntimeError, match="accelerate sees 1 processes, the group has 2"):
        accelerator(TRAIN, workers=2)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"train.precision='fp16' needs a GPU; try bf16 or fp32"):
            accelerator(TRAIN.model_copy(update={"precision": "fp16"}), workers=1)


def test_a_base_with_dropout_is_trained_without_it(run: Run, tmp_path: Path) -> None:
    """It would draw from the process's own generator, which knows neither work nor epoch."""
    base = shutil.copytree(run.diffusion.model, tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps({**config, "dropout": 0.5}))
    other = replace(run, diffusion=Diffusion(model=str(base)), store=Store(str(tmp_path / "other")))
    assert Trainer(other, Events()).train().losses == Trainer(run, Events()).train().losses


def test_a_work_is_trained_on_mirrored_or_not_whoever_draws_it(run: Run) -> None:
    """By 1, 2 and 3 workers; a mirror image comes as it was encoded, and all else in the sample is as it was."""
    mirrored = torch.randn(run.cache.stacked().shape, generator=torch.Generator().manual_seed(6)).half()
    with pytest.raises(ValueError, match=r"train.flip=true, but these latents have no mirror images: set encode.mirrored=true"):
        Trainer(changed(run, flip=True), Events())
    flipping = changed(replace(run, cache=replace(run.cache, mirrored=mirrored)), flip=True)
    sides = run, replace(run, cache=replace(run.cache, moments=mirrored)), flipping
    plain, of_mirrors, found = (Trainer(side, Events()).batches for side in sides)

    def samples(rank: int, workers: int, images_seen: int) -> list[tuple[str, list[float]]]:
        one = copy.copy(found)
        one.rank, one.workers = rank, workers
        return [
            (work, row.flatten().tolist())
            for part in one.make(images_seen)
            for work, row in zip(part.ids, part.noisy, strict=True)
        ]

    flipped = []
    for images_seen in range(0, 96, 8):
        for straight, mirror, mine in zip(*(side.make(images_seen) for side in (plain, of_mirrors, found)), strict=True):
            assert mine.ids == straight.ids
            assert torch.equal(mine.timesteps, straight.timesteps)
            assert torch.equal(mine.target, straight.target)  # the noise
            assert torch.equal(mine.text, straight.text)
            where = (mine.noisy != straight.noisy).flatten(1).any(1)
            assert torch.equal(mine.noisy, torch.where(where.view(-1, 1, 1, 1), mirror.noisy, straight.noisy))
            flipped += where.tolist()
        for workers in (2, 3):
            together = [sample for rank in range(workers) for sample in samples(rank, workers, images_seen)]
            assert sorted(together) == sorted(samples(0, 1, images_seen))
    assert 30 < sum(flipped) < 66  # of 96


def test_works_of_several_shapes_train_together(run: Run) -> None:
    """Buckets: each pass holds one shape; every work is seen once an epoch."""
    moments = [row if index % 3 else torch.cat([row, row], dim=-1) for index, row in enumerate(run.cache.moments)]
    trainer = Trainer(replace(run, cache=replace(run.cache, moments=moments)), Events())
    seen: list[str] = []
    make = trainer.batches.make

    def noted(images_seen: int) -> list[Pass]:
        parts = make(images_seen)
        if images_seen < TRAIN.images:
            seen.extend(work for part in parts for work in part.ids)
        assert all(len({part.noisy.shape[1:]}) == 1 for part in parts)
        return parts

    trainer.batches.make = noted  # type: ignore[method-assign]
    assert trainer.train().images_seen == 48
    assert len(seen) == 48
    assert set(Counter(seen).values()) <= {3, 4, 5, 6}  # 48 images of 11 works in cells of two shapes
