"""What people prefer: pairwise votes, kept as they were cast, and the strengths that explain them.

    <root>/votes/<batch>.jsonl    one vote a line: {"winner": "RUN@IMAGES", "loser": "RUN@IMAGES", ...}

A batch is written once, under a name that nobody else takes, and never changed: so no two writers meet, in a folder or in a
bucket. What else a line says (prompt, seed, who voted) is kept and not read.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from momalisa.storage import Store

FOLDER = "votes"
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Vote:
    """One comparison of two checkpoints' pictures, by their `RUN@IMAGES`; `base` is the base model."""

    winner: str
    loser: str


def cast(store: Store, votes: Iterable[Vote], **about: Any) -> str:
    """Store a batch of votes and return its path. `about` goes into every line: prompt, seed, and the like (JSON values).

    Raises ValueError for a vote of a checkpoint against itself, and for no vote at all.
    """
    lines = []
    for vote in votes:
        if not vote.winner or not vote.loser or vote.winner == vote.loser:
            raise ValueError(f"a vote is between two checkpoints, not {vote.winner!r} and {vote.loser!r}")
        lines.append(json.dumps({**about, "winner": vote.winner, "loser": vote.loser}, sort_keys=True))
    if not lines:
        raise ValueError("a batch of votes holds at least one")
    path = f"{FOLDER}/{uuid.uuid4().hex}.jsonl"
    store.write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path


def read(store: Store) -> list[Vote]:
    """Every vote ever cast, in the order of the batches' names. A line that is no vote is passed over and counted aloud."""
    votes, bad = [], 0
    for path in store.list(FOLDER):
        for line in store.read_bytes(path).decode(errors="replace").splitlines():
            vote = _parse(line)
            if vote is None:
                bad += 1
            else:
                votes.append(vote)
    if bad:
        print(f"votes: {bad} lines of {store.url(FOLDER)} are no votes; passed over", flush=True)
    return votes


def _parse(line: str) -> Vote | None:
    try:
        value: Mapping[str, Any] = json.loads(line)
        winner, loser = value["winner"], value["loser"]
    except (ValueError, KeyError, TypeError):
        return None
    good = isinstance(winner, str) and isinstance(loser, str) and winner and loser and winner != loser
    return Vote(winner, loser) if good else None


def identity(votes: Sequence[Vote]) -> str:
    """A name for some votes, whatever their order."""
    return hashlib.sha256(repr(sorted((vote.winner, vote.loser) for vote in votes)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Strengths:
    """Bradley-Terry strengths (log odds, their mean 0) and the covariance of their estimates."""

    names: tuple[str, ...]
    values: np.ndarray  # [N] float64
    covariance: np.ndarray  # [N, N] float64

    def difference(self, one: str, other: str) -> tuple[float, float, float]:
        """How much stronger one is, and its 95% interval; 0 is a tie."""
        i, j = self.names.index(one), self.names.index(other)
        mean = float(self.values[i] - self.values[j])
        variance = self.covariance[i, i] + self.covariance[j, j] - 2 * self.covariance[i, j]
        half = Z_95 * float(np.sqrt(max(variance, 0.0)))
        return mean, mean - half, mean + half

    @property
    def best(self) -> str:
        return self.names[int(np.argmax(self.values))]


def fit(votes: Sequence[Vote]) -> Strengths:
    """Strengths by maximum likelihood (Bradley & Terry 1952): P(i beats j) = 1 / (1 + exp(s_j - s_i)).

    Each pair that met gets half a vote both ways (Haldane 1956), so that one who never lost has a finite strength. Those who
    are not connected by votes have wide intervals. Newton's method; the covariance is the inverse of the information matrix.
    Raises ValueError where there is no vote.
    """
    names = tuple(sorted({name for vote in votes for name in (vote.winner, vote.loser)}))
    if not names:
        raise ValueError("there are no votes to fit")
    place = {name: index for index, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for vote in votes:
        wins[place[vote.winner], place[vote.loser]] += 1
    wins += 0.5 * ((wins + wins.T) > 0)
    games, values = wins + wins.T, np.zeros(len(names))
    for _ in range(100):
        chance = 1 / (1 + np.exp(values[None, :] - values[:, None]))
        gradient = wins.sum(1) - (games * chance).sum(1)
        step = _inverse(_information(games, chance)) @ gradient
        step *= min(1.0, 1.0 / max(float(np.abs(step).max()), 1e-12))  # not over the hill
        values = values + step - step.mean()
        if np.abs(step).max() < 1e-10:
            break
    chance = 1 / (1 + np.exp(values[None, :] - values[:, None]))
    return Strengths(names, values, _inverse(_information(games, chance)))


def _information(games: np.ndarray, chance: np.ndarray) -> np.ndarray:
    weights = games * chance * (1 - chance)
    information: np.ndarray = np.diag(weights.sum(1)) - weights
    return information


UNCONNECTED = 1e-6  # information about whatever no vote tells: intervals of a thousand


def _inverse(information: np.ndarray) -> np.ndarray:
    """Of a singular matrix: only differences are known."""
    inverse: np.ndarray = np.linalg.inv(information + UNCONNECTED * np.eye(len(information)))
    return inverse
