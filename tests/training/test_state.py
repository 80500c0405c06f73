"""What is saved comes back bit by bit, and only to the model it belongs to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from momalisa.training import state
from momalisa.training.ema import Ema
from momalisa.training.state import Progress

Parts = tuple[dict[str, torch.nn.Parameter], Ema, torch.optim.AdamW]


def parts(seed: int) -> Parts:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    parameters = dict(model.named_parameters())
    return parameters, Ema(parameters.items(), 0.9), torch.optim.AdamW(parameters.values(), lr=0.1)


def advance(made: Parts, steps: int, first: int = 0) -> None:
    """Steps that need the weights, the Adam moments and their step count to come out the same."""
    parameters, ema, optimizer = made
    for step in range(first, first + steps):
        source = torch.Generator().manual_seed(step)
        for value in parameters.values():
            value.grad = torch.randn(value.shape, generator=source) + 0.1 * value.detach()
        optimizer.step()
        ema.update()


def test_a_round_trip_goes_on_bit_by_bit(tmp_path: Path) -> None:
    whole, resumed = parts(1), parts(2)
    advance(whole, 3)
    state.write(tmp_path, state.tensors(*whole), asdict(Progress(96, 3, whole[1].updates, [(96, 0.1 + 0.2)])))
    progress = state.restore(tmp_path, *resumed)
    assert progress == Progress(96, 3, 3, [(96, 0.1 + 0.2)])
    advance(whole, 4, first=3)
    advance(resumed, 4, first=3)
    assert whole[1].updates == resumed[1].updates == 7
    for name in whole[0]:
        assert torch.equal(whole[0][name], resumed[0][name]), name
        assert torch.equal(whole[1].shadow[name], resumed[1].shadow[name]), name
        for key, moment in whole[2].state[whole[0][name]].items():
            assert torch.equal(moment, resumed[2].state[resumed[0][name]][key]), (name, key)


def test_no_pickle_is_written(tmp_path: Path) -> None:
    made = parts(1)
    advance(made, 1)
    state.write(tmp_path, state.tensors(*made), asdict(Progress()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.json", "trainer.safetensors"]


def test_the_state_of_another_model_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    made, other = parts(1), parts(2)
    advance(made, 1)
    state.write(tmp_path, state.tensors(*made), asdict(Progress()))
    renamed = {"lora." + name: value for name, value in other[0].items()}
    before = [value.clone() for value in renamed.values()]
    with pytest.raises(ValueError, match=r"the state of another model \(4 parameters, expected 4\)"):
        state.restore(tmp_path, renamed, other[1], other[2])
    assert all(torch.equal(a, b) for a, b in zip(before, renamed.values(), strict=True))
