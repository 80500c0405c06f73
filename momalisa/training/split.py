"""Which works are held out of training: whole groups of them, a work each, or all works of an artist.

A group's side is a function of its key alone, of no order and no number: as long as some group falls on either side, none ever
changes sides when works or groups come or go. So the share that is asked for is met as nearly as chance and whole groups let it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Mapping


def by_work(ids: Collection[str]) -> dict[str, str]:
    """{id: its group}: each work alone. Raises ValueError for fewer than two."""
    if len(ids) < 2:
        raise ValueError(f"a collection of {len(ids)} works cannot be split into training and held-out; collect at least 2")
    return {id: id for id in ids}


def by_artist(artists: Mapping[str, str], seed: int) -> dict[str, str]:
    """{id: its group} from {id: artist}: an artist's works together, those of nobody alone. Another seed deals anew.

    Raises ValueError where that is one group.
    """
    named = by_work(artists)
    for id, artist in artists.items():
        name = first_artist(artist)
        named[id] = repr((seed, "artist", name) if name else (seed, "work", id))
    if len(set(named.values())) < 2:
        raise ValueError(
            f"train.split_by=artist: all {len(artists)} works are by {min(artists.values())}, and an artist's works are either "
            "trained on or held out; collect works of another artist, or set train.split_by=work"
        )
    return named


def first_artist(artist: str) -> str:
    """The artist who is named first, however it is capitalised and spaced; empty where nobody is."""
    names = unicodedata.normalize("NFKC", artist).casefold().split(",")
    return next((name for name in (" ".join(name.split()) for name in names) if name), "")


def held_out(groups: Mapping[str, str], fraction: float) -> tuple[str, ...]:
    """The works that are held out, in order of id, from {id: its group}, of two groups or more: those of the groups whose hash,
    as a share of all hashes, is below `fraction`. At least one group is, and at least one is not."""
    places = sorted((_place(group), group) for group in set(groups.values()))
    below = sum(place < fraction for place, _ in places)
    chosen = {group for _, group in places[: min(max(below, 1), len(places) - 1)]}
    return tuple(sorted(id for id, group in groups.items() if group in chosen))


def _place(group: str) -> float:
    return float(int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32)
