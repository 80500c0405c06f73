"""A fused caption fits the text encoder, begins with the caption, and is cut between words only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momalisa.captioner.fused import BUDGET, details, fuse
from momalisa.miniature import models

TOKENIZER = models.build_clip_tokenizer()
WORDS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="äöü水墨画🎨👩‍🎨 \t\n,.-'", max_size=60),
    st.text(alphabet="abc", min_size=80, max_size=300),
    st.lists(st.sampled_from(["a", "red", "circle", "on", "white"]), max_size=80).map(" ".join),
)


def count(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False, verbose=False).input_ids)


@given(WORDS, st.lists(WORDS, max_size=4), st.integers(0, BUDGET))
def test_whatever_it_is_given(caption: str, parts: list[str], budget: int) -> None:
    fused = fuse(caption, parts, count, budget)
    assert count(fused) <= budget
    assert fused == " ".join(fused.split())

    plain = " ".join(caption.split())
    if not plain:
        assert fused == ""
    elif count(plain) > budget:  # whole words of the caption, and no fewer than fit
        kept = fused.split()
        assert kept == plain.split()[: len(kept)]
        assert count(" ".join(plain.split()[: len(kept) + 1])) > budget
    else:  # the caption, then whole parts, and no fewer than fit
        whole = [" ".join(part.split()) for part in parts if part.strip()]
        candidates = [", ".join([plain, *whole[:number]]) for number in range(len(whole) + 1)]
        assert fused in candidates
        assert all(count(longer) > budget for longer in candidates[candidates.index(fused) + 1 :])


def test_what_it_reads_like() -> None:
    known = details("Untitled", " Kara\nWalker ", "oil on canvas")
    assert fuse("A MOMA artwork of: a boat", known, count) == (
        "A MOMA artwork of: a boat, titled Untitled, by Kara Walker, oil on canvas"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [(("", "", ""), []), (("", "Klee", " "), ["by Klee"]), (("Sea", "", "ink"), ["titled Sea", "ink"])],
)
def test_what_is_not_known_is_left_out(given: tuple[str, str, str], expected: list[str]) -> None:
    assert details(*given) == expected


def test_the_last_part_goes_first_and_a_short_one_does_not_take_its_place() -> None:
    assert fuse("a boat", ["titled " + "red " * 80, "ink"], count) == "a boat"
    assert fuse("a boat", ["ink", "red " * 80], count) == "a boat, ink"
