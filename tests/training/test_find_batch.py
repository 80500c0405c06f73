"""The helper measures real steps and recommends the smallest size that is nearly the fastest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from momalisa.config import Diffusion, Encode, Settings, Train
from momalisa.training import find_batch
from momalisa.training.find_batch import Trial


def settings_of(base: Path) -> Settings:
    return Settings(diffusion=Diffusion(model=str(base)), encode=Encode(resolution_px=64), train=Train(batch=16, workers=1))


def test_sizes_double_up_to_a_workers_share() -> None:
    assert find_batch.sizes(12) == [1, 2, 4, 8, 12]
    assert find_batch.sizes(1) == [1]


def test_the_smallest_that_is_nearly_the_fastest() -> None:
    found = [Trial(1, 10.0, 1), Trial(2, 19.0, 1), Trial(4, 30.0, 2), Trial(8, 30.5, 4), Trial(16, 28.0, 8)]
    assert find_batch.best(found).micro_batch == 4


def test_it_is_measured_and_said(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    chosen = "encode: {resolution_px: 64, mirrored: true}\ntrain: {batch: 4, workers: 1, flip: true}\n"
    config.write_text(f"diffusion: {{model: {tiny_base}}}\n{chosen}")
    monkeypatch.setattr(sys, "argv", ["find_batch", "--config", str(config)])
    find_batch.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1", "2", "4"]
    assert lines[-1].startswith("use --train.micro_batch=")


FULL = [
    torch.OutOfMemoryError("full"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
]


@pytest.mark.parametrize("full", FULL, ids=["allocator", "cuBLAS", "driver"])
def test_it_ends_where_memory_does(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, full: RuntimeError) -> None:
    def small(settings: Settings, size: int, steps: int) -> Trial:
        if size > 2:
            raise full
        return Trial(size, 1.0, 1.0)

    monkeypatch.setattr(find_batch, "measure", small)
    assert [trial.micro_batch for trial in find_batch.trials(settings_of(tiny_base))] == [1, 2]


def test_another_error_is_not_a_full_memory(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Trial:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(find_batch, "measure", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(find_batch.trials(settings_of(tiny_base)))
