"""Which works are held out: whole groups, by their own keys."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from momalisa.training import split

fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 5)
ARTISTS = ["", " ", "Agnes Martin", "agnes  martin", "Ad Reinhardt", "Ad Reinhardt, Agnes Martin", "Piet Mondrian"]
collections = st.dictionaries(st.text(max_size=5), st.sampled_from(ARTISTS), min_size=1, max_size=30).map(
    lambda artists: {**artists, "one more": "Sol LeWitt"}
)


def held_out(artists: dict[str, str], fraction: float, seed: int = 0) -> set[str]:
    return set(split.held_out(split.by_artist(artists, seed), fraction))


@settings(deadline=None)
@given(names=st.sets(st.text(max_size=5), min_size=2, max_size=30), fraction=fractions)
def test_by_work_the_hash_of_the_id_decides(names: set[str], fraction: float) -> None:
    """By this very formula: runs go on with the works that they held out before."""
    places = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names}
    expected = {name for name, place in places.items() if place < fraction} or {min(places, key=places.__getitem__)}
    if expected == names:
        expected = names - {max(places, key=places.__getitem__)}
    found = split.held_out(split.by_work(names), fraction)
    assert list(found) == sorted(expected)


def test_a_work_never_changes_sides_as_a_collection_grows() -> None:
    names = [f"moma-{number}" for number in range(400)]
    few, many = (set(split.held_out(split.by_work(part), 0.1)) for part in (names[:200], names))
    assert few == many & set(names[:200])
    assert 20 <= len(many) <= 60
    assert many <= set(split.held_out(split.by_work(names), 0.2))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("by", ["work", "artist"])
def test_fewer_than_two_works_cannot_be_split(count: int, by: str) -> None:
    names = ["a", "b"][:count]
    with pytest.raises(ValueError, match=f"a collection of {count} works cannot be split"):
        split.by_work(names) if by == "work" else split.by_artist(dict.fromkeys(names, "Agnes Martin"), 0)


@settings(deadline=None)
@given(artists=collections, fraction=fractions, seed=seeds, order=st.randoms(use_true_random=False))
def test_no_artist_is_on_both_sides_in_any_order(
    artists: dict[str, str], fraction: float, seed: int, order: random.Random
) -> None:
    held = held_out(artists, fraction, seed)
    assert held
    assert held < set(artists)
    sides = [{split.first_artist(artists[id]) for id in side} - {""} for side in (held, set(artists) - held)]
    assert not sides[0] & sides[1]
    shuffled = order.sample(sorted(artists), len(artists))
    assert held_out({id: artists[id] for id in shuffled}, fraction, seed) == held


@settings(deadline=None)
@given(artists=collections, more=st.integers(1, 20), fraction=fractions, seed=seeds, data=st.data())
def test_more_works_of_an_artist_move_nobody(
    artists: dict[str, str], more: int, fraction: float, seed: int, data: st.DataObject
) -> None:
    artist = data.draw(st.sampled_from(sorted({artist for artist in artists.values() if split.first_artist(artist)})))
    before = {**artists, "its first": artist}
    after = {**before, **{f"its work {number}": artist for number in range(more)}}
    held = held_out(before, fraction, seed)
    assert held_out(after, fraction, seed) & set(before) == held
    assert {id in held_out(after, fraction, seed) for id in after if after[id] == artist} == {"its first" in held}


@settings(deadline=None)
@given(artists=collections, newcomers=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=20), seed=seeds)
def test_more_artists_move_nobody_as_long_as_both_sides_have_one(
    artists: dict[str, str], newcomers: dict[str, str], seed: int
) -> None:
    many = {f"anchor {number}": f"Anchor {number}" for number in range(50)}
    held = held_out(many, 0.5, seed)
    anchors = {id: many[id] for id in (min(held), min(set(many) - held))}
    before = {**artists, **anchors}
    after = {**newcomers, **before}
    assert held_out(after, 0.5, seed) & set(before) == held_out(before, 0.5, seed)


def test_the_share_is_met_over_many_artists_and_another_seed_deals_anew() -> None:
    artists = {f"moma-{number}": f"Artist {int(number**0.9)}" for number in range(4000)}
    assert max(Counter(artists.values()).values()) > 1
    first, again, other = (held_out(artists, 0.1, seed) for seed in (0, 0, 1))
    assert first == again
    assert 0.08 < len(first) / len(artists) < 0.12
    assert len(first & other) < len(first) / 2


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("Agnes Martin", "agnes martin"),
        (" AGNES\n Martin ", "agnes martin"),
        ("Agnes\u00a0Martin, Ad Reinhardt", "agnes martin"),
        (", Agnes Martin", "agnes martin"),
        ("", ""),
        (" , ", ""),
    ],
)
def test_the_artist_is_who_is_named_first(told: str, meant: str) -> None:
    assert split.first_artist(told) == meant


def test_one_artist_is_an_error_that_says_the_way_out() -> None:
    works = {"a": "Agnes Martin", "b": "agnes martin", "c": "Agnes Martin, Ad Reinhardt"}
    with pytest.raises(ValueError, match=r"train.split_by=artist: all 3 works are by Agnes Martin.*or set train.split_by=work"):
        split.by_artist(works, 0)
    assert len(held_out({**works, "d": ""}, 0.5)) in (1, 3)  # a work of nobody is a group of its own
    assert len(held_out(dict.fromkeys("abcd", ""), 0.01)) == 1
