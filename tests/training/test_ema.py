"""The average of the weights, in fp32, lent to the model and taken back."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import Parameter

from momalisa.training.ema import Ema


def test_the_average_follows_its_formula() -> None:
    weight = Parameter(torch.tensor([0.0]))
    ema, expected = Ema([("w", weight)], decay=0.3), 0.0
    for updates in range(8):
        with torch.no_grad():
            weight.fill_(updates + 1.0)
        ema.update()
        decay = min(0.3, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * (updates + 1)
        assert float(ema.shadow["w"]) == pytest.approx(expected, rel=1e-6)
    assert ema.updates == 8


def test_half_precision_weights_are_averaged_in_fp32() -> None:
    weight = Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = Ema([("w", weight)], decay=0.9999)
    ema.updates = 1_000_000
    with torch.no_grad():
        weight.fill_(1.0078125)
    ema.update()
    assert ema.shadow["w"].dtype == torch.float32
    assert 1.0 < float(ema.shadow["w"]) < 1.00001  # bf16 has nothing between 1 and 1.0078


def test_applied_lends_the_average_and_gives_the_weights_back() -> None:
    weight = Parameter(torch.tensor([1.0, 2.0]))
    ema = Ema([("w", weight)], decay=0.9)
    with torch.no_grad():
        weight.add_(10)
    with ema.applied():
        assert weight.tolist() == [1.0, 2.0]
    assert weight.tolist() == [11.0, 12.0]
    with contextlib.suppress(KeyboardInterrupt), ema.applied():
        raise KeyboardInterrupt
    assert weight.tolist() == [11.0, 12.0]
    assert ema.shadow["w"].tolist() == [1.0, 2.0]
