"""What a trainer is asked for beside the plain loop: adapters, other targets, the prior, smaller memory, stopping early."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from momalisa import checkpoint as checkpoints
from momalisa.config import Diffusion, Train
from momalisa.latents import TextEncoder
from momalisa.storage import Store
from momalisa.training import batches, loop
from momalisa.training.cache import LatentCache
from momalisa.training.loop import Events, Run, Trainer
from momalisa.training.processes import determinism

TRAIN = Train(images=16, batch=8, workers=1, precision="fp32", learning_rate=1e-2, checkpoint_every_images=8)
PROMPT = "three red circles"


def run_of(base: Path, place: Path, **settings: Any) -> Run:
    source = torch.Generator().manual_seed(5)
    mean, log_variance = torch.randn((9, 4, 4, 4), generator=source), torch.full((9, 4, 4, 4), -4.0)
    token_ids = TextEncoder.load(Diffusion(model=str(base))).tokenize([f"{i} red circles" for i in range(9)])
    names = [f"work-{i}" for i in range(9)]
    cache = LatentCache(names, names, list(torch.cat([mean, log_variance], dim=1).half()), token_ids)
    return Run("o", Train(**{**TRAIN.model_dump(), **settings}), Diffusion(model=str(base)), cache, Store(str(place)))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    for part in trainer.batches.at(0):
        trainer.accelerator.backward(trainer.loss(part))
    return {name: value.grad.clone() for name, value in trainer.trained.items() if value.grad is not None}


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_alpha": 6.0}, {"dora": True}, {"dora": True, "lora_alpha": 1.0}, {"lora_text_encoder": True, "lora_alpha": 4.0}],
    ids=str,
)
def test_plain_diffusers_draws_with_the_adapters_as_training_did(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    run = run_of(tiny_base, tmp_path, lora_rank=2, **options)
    trainer = Trainer(run, Events())
    trainer.train()
    noisy, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad(), trainer.ema.applied():
        text = trainer.text_encoder.embed(trainer.text_encoder.tokenize([PROMPT]))
        ours = trainer.bare.eval()(noisy, t, text)
    saved = checkpoints.read_all(run.store, run.name)[-1]
    folder = Path(run.store.root) / saved.path / "weights"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None, dtype=torch.float32)
    base = pipeline.unet(noisy, t, pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]).sample
    pipeline.load_lora_weights(folder, weight_name=checkpoints.LORA_FILE)
    with torch.no_grad():
        theirs = pipeline.unet(noisy, t, pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]).sample
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        assert float((base - ours).abs().max()) > 1e-2
        served = checkpoints.load_unet(run.store, saved)(noisy, t, text).sample
    torch.testing.assert_close(served, ours, rtol=1e-4, atol=1e-4)
    keys = load_file(folder / checkpoints.LORA_FILE)
    assert any(key.startswith("text_encoder.") for key in keys) == bool(options.get("lora_text_encoder"))


def test_adapters_on_the_text_encoder_are_trained_and_resumed(tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(tiny_base, tmp_path / "a", lora_rank=2, lora_text_encoder=True)
    trainer = Trainer(run, Events())
    frozen = {
        name: value.clone() for name, value in trainer.bare.state_dict().items() if name.split("unet.")[-1] not in trainer.trained
    }
    start = {name: value.detach().clone() for name, value in trainer.trained.items() if name.startswith("text_encoder.")}
    trainer.train()
    assert start
    assert all(not torch.equal(trainer.trained[name], value) for name, value in start.items() if ".lora_B." in name)
    assert all(torch.equal(trainer.bare.state_dict()[name], value) for name, value in frozen.items())
    again = replace(run, store=Store(str(tmp_path / "b")))
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "o" / "000000016")
    Trainer(again, Events()).train()
    ends = [checkpoints.read_all(part.store, "o")[-1] for part in (run, again)]
    assert ends[0].state == ends[1].state


def test_a_run_in_channels_last_goes_on_bit_by_bit(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a GPU, where the optimizer's kernel goes through weights and moments as they lie in memory."""
    monkeypatch.setattr(loop, "LAYOUTS", {"cpu": torch.channels_last})
    whole, again = (run_of(tiny_base, tmp_path / part) for part in "ab")
    Trainer(whole, Events()).train()
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "o" / "000000016")
    trainer = Trainer(again, Events())
    assert any(not value.is_contiguous() for value in trainer.trained.values())
    for name, value in trainer.trained.items():
        assert trainer.ema.shadow[name].stride() == value.stride(), name
    assert trainer.train().images_seen == 16
    ends = [checkpoints.read_all(part.store, "o")[-1] for part in (whole, again)]
    assert ends[0].state == ends[1].state


def test_a_model_of_v_learns_v(v_base: Path, tmp_path: Path) -> None:
    trainer = Trainer(run_of(v_base, tmp_path / "s", caption_dropout=0.0), Events())
    part, theirs = trainer.batches.at(0)[0], DDPMScheduler.from_pretrained(v_base, subfolder="scheduler")
    roots = theirs.alphas_cumprod[part.timesteps].view(-1, 1, 1, 1)
    # x_t and v give x0 = sqrt(abar) x_t - sqrt(1 - abar) v and e = sqrt(1 - abar) x_t + sqrt(abar) v
    latents = roots.sqrt() * part.noisy - (1 - roots).sqrt() * part.target
    noise = (1 - roots).sqrt() * part.noisy + roots.sqrt() * part.target
    torch.testing.assert_close(part.target, theirs.get_velocity(latents, noise, part.timesteps), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.noisy, theirs.add_noise(latents, noise, part.timesteps), rtol=1e-4, atol=1e-4)
    snr = roots.flatten() / (1 - roots.flatten())
    torch.testing.assert_close(part.weights * 8, snr.clamp(max=5) / (snr + 1), rtol=1e-3, atol=1e-4)


def test_zero_terminal_snr_is_for_models_of_v(tiny_base: Path, v_base: Path, tmp_path: Path) -> None:
    from momalisa.diffusion import Schedule

    rescaled = Schedule.load(Diffusion(model=str(v_base)), zero_terminal_snr=True).alphas_cumprod
    theirs = DDPMScheduler.from_pretrained(v_base, subfolder="scheduler", rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(rescaled[:-1].float(), theirs[:-1], rtol=1e-3, atol=1e-6)
    assert rescaled[-1] == 0
    with pytest.raises(ValueError, match=r"train.zero_terminal_snr: .* predicts 'epsilon', .* set it to false"):
        Trainer(run_of(tiny_base, tmp_path / "s", zero_terminal_snr=True, min_snr_gamma=None), Events())
    with pytest.raises(ValueError, match="set min_snr_gamma to null"):
        Train(zero_terminal_snr=True)
    Trainer(run_of(v_base, tmp_path / "t", zero_terminal_snr=True, min_snr_gamma=None), Events()).train()


def test_offset_noise_is_constant_over_a_channel(tiny_base: Path, tmp_path: Path) -> None:
    parts = [
        Trainer(run_of(tiny_base, tmp_path / str(offset), offset_noise=offset), Events()).batches.at(0)[0] for offset in (0, 0.1)
    ]
    difference = parts[1].target - parts[0].target
    assert torch.allclose(difference, difference.mean(dim=(2, 3), keepdim=True), atol=1e-5)
    assert 0.03 < float(difference[:, :, 0, 0].std()) < 0.3
    assert not torch.equal(parts[0].noisy, parts[1].noisy)
    assert torch.equal(parts[0].timesteps, parts[1].timesteps)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_the_prior_pulls_towards_the_base_and_not_before_there_is_a_difference(
    tiny_base: Path, tmp_path: Path, lora_rank: int | None
) -> None:
    plain, kept = (
        Trainer(run_of(tiny_base, tmp_path / str(weight), prior_weight=weight, lora_rank=lora_rank), Events())
        for weight in (0.0, 10.0)
    )
    without, with_prior = gradients(plain), gradients(kept)
    for name, value in without.items():  # at the start the model is the base
        torch.testing.assert_close(with_prior[name], value, rtol=1e-2, atol=1e-4)
    ends = []
    for trainer in (plain, kept):
        start = {name: value.detach().clone() for name, value in trainer.trained.items()}
        trainer.optimizer.zero_grad()
        part = trainer.batches.at(0)[0]
        trainer.train()
        with torch.no_grad():
            text = trainer.text_encoder.embed(trainer.text_encoder.tokenize(["a photo of a dog"] * len(part.ids)))
            base = checkpoints.load_base_unet(Diffusion(model=str(tiny_base)))(part.noisy, part.timesteps, text).sample
            ends.append(float((trainer.bare.eval()(part.noisy, part.timesteps, text) - base).square().mean()))
        assert any(not torch.equal(value, start[name]) for name, value in trainer.trained.items())
    assert ends[1] < 0.7 * ends[0]


def test_eight_bit_adam_learns_and_resumes_bit_by_bit(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"optimizer": "adamw8bit", "images": 24}
    whole = run_of(tiny_base, tmp_path / "a", **options)
    progress = Trainer(whole, Events()).train()
    plain = Trainer(run_of(tiny_base, tmp_path / "c", images=24), Events()).train()
    assert [loss for _, loss in progress.losses] == pytest.approx([loss for _, loss in plain.losses], rel=0.1)
    assert progress.losses != plain.losses
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "o" / "000000024")
    resumed = replace(whole, store=Store(str(tmp_path / "b")))
    assert Trainer(resumed, Events()).train() == progress
    ends = [checkpoints.read_all(part.store, "o")[-1] for part in (whole, resumed)]
    assert ends[0].state == ends[1].state


def test_without_bitsandbytes_the_way_out_is_named(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"train.optimizer=adamw8bit needs bitsandbytes .*pip install 'momalisa\[adam8bit\]'"):
        Trainer(run_of(tiny_base, tmp_path, optimizer="adamw8bit"), Events())


def test_an_average_kept_elsewhere_is_the_same(tiny_base: Path, tmp_path: Path) -> None:
    runs = [run_of(tiny_base, tmp_path / str(number), ema_offload=number == 1) for number in range(2)]
    for run in runs:
        Trainer(run, Events()).train()
    first, second = (checkpoints.read_all(run.store, "o")[-1].files for run in runs)
    assert first == second


def test_a_run_stops_at_a_checkpoint_when_asked_and_stays_so(tiny_base: Path, tmp_path: Path) -> None:
    run, asked = run_of(tiny_base, tmp_path, images=80, early_stop_patience=2), []

    def stop(images_seen: int) -> bool:
        asked.append(images_seen)
        return images_seen >= 24

    assert Trainer(run, Events(stop_due=stop)).train().images_seen == 24
    assert asked == [8, 16, 24]
    last = checkpoints.read_all(run.store, "o")[-1]
    assert (last.images_seen, last.training["stopped"]) == (24, True)
    assert Trainer(run, Events()).train().images_seen == 24
    patient = replace(run, train=run.train.model_copy(update={"early_stop_patience": None}))
    assert Trainer(patient, Events()).train().images_seen == 80  # it goes on without
    assert not checkpoints.read_all(run.store, "o")[-1].training["stopped"]


def test_each_text_is_embedded_once_and_where_there_is_no_room_in_the_step(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, embedded, losses = TextEncoder.embed, [], []

    def noted(self: TextEncoder, token_ids: torch.Tensor) -> torch.Tensor:
        embedded.extend(map(tuple, token_ids.tolist()))
        return embed(self, token_ids)

    monkeypatch.setattr(TextEncoder, "embed", noted)
    for place, room in enumerate((batches.MOST_EMBEDDINGS_BYTES, 0)):
        monkeypatch.setattr(batches, "MOST_EMBEDDINGS_BYTES", room)
        run = run_of(tiny_base, tmp_path / str(place), images=40, caption_dropout=0.5)
        token_ids = run.cache.token_ids.clone()
        token_ids[1::2] = token_ids[0]  # four works have the first one's caption
        embedded.clear()
        losses.append(Trainer(replace(run, cache=replace(run.cache, token_ids=token_ids)), Events()).train().losses)
        assert len(set(embedded)) == 6  # five captions, and none
        assert len(embedded) == (6 if room else 40)
    assert [loss for _, loss in losses[1]] == pytest.approx([loss for _, loss in losses[0]], rel=1e-4)


def test_determinism_is_set_and_taken_back(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        )

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for workspace in (None, ":16:8"):
        if workspace:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
        with determinism(False):
            assert state() == (False, True, workspace)
        with contextlib.suppress(KeyError), determinism(True):
            assert state() == (True, False, ":4096:8")
            Trainer(run_of(tiny_base, tmp_path / str(workspace), images=8), Events()).train()  # it has what it needs
            raise KeyError
        assert state() == (False, True, workspace)


def test_figures_of_a_run(tiny_base: Path, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    run = run_of(tiny_base, tmp_path, images=160, checkpoint_every_images=10**6, peak_tflops=1e-6)
    trainer = Trainer(run, Events(logged=seen.append))
    trainer.train()
    assert len(seen) == 2
    bins = ["loss_t000_249", "loss_t250_499", "loss_t500_749", "loss_t750_999"]
    assert set(bins) < set(seen[0])
    assert seen[0]["loss_t000_249"] != seen[1]["loss_t000_249"]  # of the steps since the last time
    assert 0 <= seen[1]["data_wait_fraction"] < 1
    assert 0.1 < seen[1]["peak_memory_gib"] < 20
    assert seen[1]["images_per_s"] > 0
    assert trainer.flops is not None
    flops = trainer.flops((4, 4, 4), 77)
    assert seen[1]["mfu"] == pytest.approx(3 * flops * seen[1]["images_per_s"] / 1e6, rel=0.05)


def test_the_bins_average_to_the_loss_without_weights(tiny_base: Path, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    run = run_of(tiny_base, tmp_path, images=80, checkpoint_every_images=10**6, min_snr_gamma=None)
    trainer = Trainer(run, Events(logged=seen.append))
    counts = torch.zeros(4)
    for step in range(10):
        counts += torch.bincount(torch.cat([part.timesteps for part in trainer.batches.make(step * 8)]) // 250, minlength=4)
    trainer.train()
    means = torch.tensor([seen[0][f"loss_t{low:03d}_{low + 249:03d}"] for low in (0, 250, 500, 750)])
    assert float((means * counts).sum() / 80) == pytest.approx(seen[0]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, "adapters have a rank of at least 1; try 16, or leave lora_rank out"),
        ({"dora": True}, "dora says how adapters are, but lora_rank is not set; try lora_rank=16"),
        ({"lora_alpha": 4.0}, "lora_alpha says how adapters are"),
        ({"lora_text_encoder": True}, "lora_text_encoder says how adapters are"),
    ],
)
def test_adapters_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Train(**settings)
