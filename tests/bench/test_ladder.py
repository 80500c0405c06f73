"""The ladder of bench/train.py, from rounds that are made up: which rung is compared with which, and what it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
NAMES = ["nothing switched on", "+ cached text embeddings", "+ cached moments", "+ bf16"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bench/train.py as a module, on a machine without a GPU; it and its neighbours are forgotten afterwards."""
    neighbours = ("train", "ladder", "results", "sd14")
    assert not sys.modules.keys() & set(neighbours)
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made, ladder = importlib.import_module("train"), importlib.import_module("ladder")
    monkeypatch.setattr(ladder, "RUNGS", ladder.RUNGS[:3])
    yield made
    for name in neighbours:
        sys.modules.pop(name, None)


def rows(bench: Any, *left_out: int) -> list[tuple[Any, ...]]:
    """(claim's rung, ours, peer, ratio) of the ladder where the script makes 1 image/s and rung n makes 2 ** (n + 1)."""
    options = argparse.Namespace(batch=32, precision="bf16", compile=False, optimizer="adamw")
    speeds = {name: 2 ** (number + 1) for number, name in enumerate(NAMES) if number not in left_out}
    sides = {"peer": 1} | {"ours" if name == NAMES[-1] else f"ours: {name}": speed for name, speed in speeds.items()}
    found = {name: [{"clock_s": 32 / speed, "cpu_s": 32 / speed}] * 2 for name, speed in sides.items()}
    claim = "training, images/s; ours bf16 against the script"
    figures = {
        "claim": claim,
        "ours": 16.0,
        "peer": 1.0,
        "ratio": 16.0,
        "hardware": "none",
        "ladder": bench.gains(options, found),
    }
    whole, *rungs = bench.table(figures)
    assert whole["claim"] == claim
    return [(row["claim"].partition("; ladder ")[2], row["ours"], row["peer"], row["ratio"]) for row in rungs]


def test_each_rung_is_beside_the_one_before(bench: Any) -> None:
    assert rows(bench) == [
        ("0: nothing switched on, against the script", 2, 1, 2),
        ("1: + cached text embeddings, against the rung before", 4, 2, 2),
        ("2: + cached moments, against the rung before", 8, 4, 2),
        ("3: + bf16, against the rung before", 16, 8, 2),
    ]


def test_what_a_rung_that_was_left_out_adds_is_named_with_the_next(bench: Any) -> None:
    assert rows(bench, 2) == [
        ("0: nothing switched on, against the script", 2, 1, 2),
        ("1: + cached text embeddings, against the rung before", 4, 2, 2),
        ("3: + cached moments + bf16, against the rung before", 16, 4, 4),
    ]
    assert rows(bench, 0, 1) == [
        ("2: + cached text embeddings + cached moments, against the script", 8, 1, 8),
        ("3: + bf16, against the rung before", 16, 8, 2),
    ]
    assert rows(bench, 0)[0] == ("1: + cached text embeddings, against the script", 4, 1, 4)
