"""The configurations that we ship fit the cards that they name, and the sum is what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from momalisa.checkpoint import load_base_unet
from momalisa.config import Diffusion, Settings, Train, from_file
from momalisa.training import memory
from momalisa.training.loop import Events, Trainer
from tests.training.test_options import run_of

HOME = Path(__file__).parents[2]


def settings(name: str, *overrides: str) -> Settings:
    return from_file(str(HOME / "configs" / name), list(overrides))


def test_the_size_of_stable_diffusion() -> None:
    with torch.device("meta"):
        unet = memory.build(memory.SD_1_UNET)
    assert sum(value.numel() for value in unet.parameters()) == 859_520_964


@pytest.mark.parametrize(("name", "limit"), [("sd14-24gb.yaml", 22.0), ("sd14-lora.yaml", 12.0)])
def test_a_configuration_fits_its_card(name: str, limit: float) -> None:
    found = memory.estimate(settings(name))
    assert 0.5 * limit < found.peak <= limit, found
    assert settings(name).train.ema_decay > 0
    assert settings(name).encode.resolution_px == 512


def test_what_makes_it_fit() -> None:
    """Each of the two savings is needed; the offloaded average is another way."""
    assert memory.estimate(settings("sd14-24gb.yaml", "--train.optimizer=adamw")).peak > 22
    assert memory.estimate(settings("sd14-24gb.yaml", "--train.gradient_checkpointing=false")).peak > 30
    kept = memory.estimate(settings("sd14-24gb.yaml"))
    assert kept.peak - memory.estimate(settings("sd14-24gb.yaml", "--train.ema_offload=true")).peak == pytest.approx(
        3.2, abs=0.05
    )


def test_averages_of_power_functions_are_two_more() -> None:
    plain, more, away = (
        memory.estimate(settings("sd14-24gb.yaml", *(f"--train.{option}=true" for option in options))).average
        for options in ((), ("power_ema",), ("power_ema", "ema_offload"))
    )
    assert (more, away) == (pytest.approx(3 * plain), 0)


def test_the_copy_from_which_a_checkpoint_is_written(tiny_base: Path, tmp_path: Path) -> None:
    assert memory.checkpoint_bytes(settings("sd14.yaml")) == 16 * 859_520_964
    assert memory.checkpoint_bytes(settings("sd14-24gb.yaml", "--train.power_ema=true")) == 18 * 859_520_964
    run = run_of(tiny_base, tmp_path, power_ema=True)
    trainer = Trainer(run, Events())
    trainer.step()
    held = sum(value.nbytes for value in trainer.snapshot().state.values() if value.dim())
    assert held == memory.checkpoint_bytes(Settings(diffusion=run.diffusion, train=run.train))


def test_gradients_that_workers_exchange() -> None:
    full = memory.gradient_bytes(settings("sd14-24gb.yaml"))
    assert full == 4 * 859_520_964
    assert memory.gradient_bytes(settings("sd14-24gb.yaml", "--train.gradient_compression=bf16")) == full // 2
    assert 10e6 < memory.gradient_bytes(settings("sd14-lora.yaml")) < 20e6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_grow_with_the_batch_alone(tiny_base: Path, checkpointing: bool) -> None:
    config = memory.unet_config(Diffusion(model=str(tiny_base)))
    with torch.device("meta"):
        unet = memory.build(config)
    one, four = (memory.activations(unet, (size, 4, 8, 8), True, checkpointing) for size in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.02)


def test_activations_are_what_a_real_pass_keeps(tiny_base: Path) -> None:
    """In fp32, where no autocast is imitated: bytes of the tensors that a pass on the CPU keeps, parameters aside."""
    unet = load_base_unet(Diffusion(model=str(tiny_base))).train()
    noisy, text = torch.randn(3, 4, 8, 8), torch.randn(3, 77, 32)
    own = {value.untyped_storage().data_ptr() for value in unet.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        unet(noisy, torch.zeros(3, dtype=torch.int64), text)
    real = sum(storage.nbytes() for storage in kept.values())
    with torch.device("meta"):
        imagined = memory.build(memory.unet_config(Diffusion(model=str(tiny_base))))
    assert memory.activations(imagined, (3, 4, 8, 8), False, False) == pytest.approx(real, rel=0.1)


def test_the_prior_costs_a_copy_only_without_adapters() -> None:
    full, adapters = (settings(name, "--train.prior_weight=1") for name in ("sd14-24gb.yaml", "sd14-lora.yaml"))
    assert memory.estimate(full).prior == pytest.approx(1.6, abs=0.01)
    assert memory.estimate(adapters).prior == 0
    assert memory.estimate(adapters).activations > 1.8 * memory.estimate(settings("sd14-lora.yaml")).activations


def test_a_run_that_may_shrink_has_room_for_the_share_of_the_fewest() -> None:
    one, two, shrinking = (
        memory.estimate(settings("sd14-lora.yaml", "--train.micro_batch=null", *options)).activations
        for options in ((), ("--train.workers=2",), ("--train.workers=2", "--train.min_workers=1"))
    )
    assert two < 0.6 * one
    assert shrinking == one


def test_an_early_stop_has_a_second_model_between_steps(tiny_base: Path) -> None:
    found = memory.estimate(settings("sd14-lora.yaml", "--train.early_stop_patience=3"))
    assert found.early_stop > found.weights + found.text_encoder
    assert replace(found, early_stop=0).peak == found.peak <= 12  # less than a step takes
    small = replace(found, activations=0, evaluation=0)
    assert small.peak - replace(small, early_stop=0).peak == pytest.approx(found.early_stop - found.autocast - found.gradients)
    assert memory.estimate(Settings(diffusion=Diffusion(model=str(tiny_base)), train=Train(workers=1))).early_stop == 0


def test_the_table_adds_up(tiny_base: Path) -> None:
    made = Settings(diffusion=Diffusion(model=str(tiny_base)), train=Train(workers=1))
    lines = memory.table(made).splitlines()
    assert [line.split()[0] for line in lines][-3:] == ["peak", "exchanged", "checkpoint"]
    peak, exchanged, written = (float(line.split()[1]) for line in lines[-3:])
    assert peak == pytest.approx(memory.estimate(made).peak, abs=0.01)
    assert exchanged == pytest.approx(memory.gradient_bytes(made) / 1e6, abs=0.1)
    assert lines[-1].endswith("kept for the run; 20% more beside a GPU")
    assert written == pytest.approx(memory.checkpoint_bytes(made) / memory.GIB, abs=0.01)


def test_every_option_is_documented() -> None:
    text = (HOME / "docs" / "training.md").read_text()
    assert [name for name in Train.model_fields if f"`{name}`" not in text and f"`{name}:" not in text] == []


def test_the_documented_peaks_are_what_is_computed() -> None:
    text = (HOME / "docs" / "training.md").read_text()
    for name in ("sd14.yaml", "sd14-24gb.yaml", "sd14-lora.yaml"):
        (line,) = [line for line in text.splitlines() if line.startswith("| one card") and f"`configs/{name}`" in line]
        assert f"{memory.estimate(settings(name)).peak:.1f} GiB" in line
