"""One text out of a caption and what a museum knows of the work, within what a text encoder reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BUDGET = 75  # of CLIP's 77 tokens: one begins and one ends a text


def details(title: str, artist: str, medium: str) -> list[str]:
    """What follows a caption, in order of weight: `titled Untitled`, `by Kara Walker`, `oil on canvas`."""
    return [f"{word} {value}".strip() for word, value in (("titled", title), ("by", artist), ("", medium)) if value.strip()]


def fuse(caption: str, parts: Sequence[str], count: Callable[[str], int], budget: int = BUDGET) -> str:
    """`caption, part, part`: as many whole parts as the budget holds, the last dropped first.

    Where the caption alone is too long it loses whole words from its end. `count` gives a text's tokens; white space
    becomes single spaces. An empty caption stays empty.
    """
    pieces = [" ".join(piece.split()) for piece in (caption, *parts)]
    if not pieces[0]:
        return ""
    pieces = [pieces[0], *filter(None, pieces[1:])]
    for kept in range(len(pieces), 0, -1):
        if count(text := ", ".join(pieces[:kept])) <= budget:
            return text
    words = pieces[0].split(" ")
    while words and count(" ".join(words)) > budget:
        words.pop()
    return " ".join(words)
