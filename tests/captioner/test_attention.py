"""Both ways to attend give what the definition gives."""

from __future__ import annotations

import pytest
import torch

from momalisa.captioner import attention
from momalisa.captioner.attention import attend


@pytest.mark.parametrize("few", [0, 128])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_a_weighted_mean_of_what_is_seen(few: int, queries: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "FEW", few)
    draws = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, generator=draws) for length in (queries, 9, 9))
    seen = torch.arange(9) <= 4 if masked else None
    weights = (query @ key.transpose(-1, -2) / 8**0.5).exp() * (1 if seen is None else seen)
    expected = (weights / weights.sum(dim=-1, keepdim=True)) @ value
    torch.testing.assert_close(attend(query, key, value, seen), expected)
