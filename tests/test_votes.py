"""Votes are kept as they were cast, and strengths say what they are worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from momalisa import votes
from momalisa.storage import Store
from momalisa.votes import Vote


def between(one: str, other: str, wins: int, losses: int) -> list[Vote]:
    return [Vote(one, other)] * wins + [Vote(other, one)] * losses


def test_batches_are_kept_apart_and_read_together(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert votes.read(store) == []
    first = votes.cast(store, [Vote("r@1", "r@2"), Vote("r@2", "r@1")], prompt="a boat", seed=7)
    data = store.read_bytes(first)
    votes.cast(store, [Vote("r@3", "base")])
    assert store.read_bytes(first) == data
    assert len(store.list("votes")) == 2
    assert sorted(votes.read(store), key=str) == sorted([Vote("r@1", "r@2"), Vote("r@2", "r@1"), Vote("r@3", "base")], key=str)
    assert b'"prompt": "a boat"' in data


def test_lines_that_are_no_votes_are_counted_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path))
    good = b'{"winner": "r@1", "loser": "r@2"}\n'
    bad = [b"{", b"3", b'{"winner": "r@1"}', b'{"winner": "r@1", "loser": "r@1"}', b'{"winner": 1, "loser": "r@2"}', b"\xff"]
    store.write_bytes("votes/x.jsonl", good + b"\n".join(bad) + b"\n")
    assert votes.read(store) == [Vote("r@1", "r@2")]
    assert "6 lines" in capsys.readouterr().out


def test_a_vote_is_between_two(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match="between two checkpoints, not 'r@1' and 'r@1'"):
        votes.cast(store, [Vote("r@1", "r@1")])
    with pytest.raises(ValueError, match="at least one"):
        votes.cast(store, [])
    assert store.list("votes") == []


def test_two_that_met_have_the_log_odds_of_their_games() -> None:
    found = votes.fit(between("a", "b", 149, 50))
    mean, low, high = found.difference("a", "b")
    assert mean == pytest.approx(np.log(149.5 / 50.5), rel=1e-6)
    spread = 1.959964 * np.sqrt(1 / 149.5 + 1 / 50.5)  # Woolf's interval of a log odds
    assert (low, high) == (pytest.approx(mean - spread, rel=1e-3), pytest.approx(mean + spread, rel=1e-3))
    assert found.best == "a"


def test_a_tie_is_inside_the_interval_of_even_votes_and_outside_of_clear_ones() -> None:
    for wins, clear in ((100, False), (105, False), (125, True), (200, True)):
        _, low, _ = votes.fit(between("a", "b", wins, 200 - wins)).difference("a", "b")
        assert (low > 0) is clear, wins


def test_who_never_met_is_unknown() -> None:
    found = votes.fit(between("a", "b", 30, 10) + between("c", "d", 30, 10))
    _, low, high = found.difference("a", "c")
    assert high - low > 100
    assert votes.fit(between("a", "b", 30, 10) + between("b", "c", 30, 10)).difference("a", "c")[1] > 0  # through b


def test_no_votes_no_strengths() -> None:
    with pytest.raises(ValueError, match="no votes"):
        votes.fit([])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")).filter(lambda pair: pair[0] != pair[1]), min_size=1))
def test_expected_wins_are_the_wins(pairs: list[tuple[str, str]]) -> None:
    """The likelihood equations, whatever was voted; and the order of votes changes nothing."""
    cast = [Vote(*pair) for pair in pairs]
    found = votes.fit(cast)
    assert found.values.sum() == pytest.approx(0, abs=1e-6)
    for name, value in zip(found.names, found.values, strict=True):
        met = {other for vote in cast for other in (vote.winner, vote.loser) if name in (vote.winner, vote.loser)} - {name}
        games = {other: sum({vote.winner, vote.loser} == {name, other} for vote in cast) + 1 for other in met}
        wins = sum(vote.winner == name for vote in cast) + 0.5 * len(met)
        strength = dict(zip(found.names, found.values, strict=True))
        expected = sum(count / (1 + np.exp(strength[other] - value)) for other, count in games.items())
        assert expected == pytest.approx(wins, abs=1e-5)
    again = votes.fit(cast[::-1])
    assert np.allclose(again.values, found.values)
    assert votes.identity(cast) == votes.identity(cast[::-1])
