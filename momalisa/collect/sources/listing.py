"""What a source says of one work: where its picture is, or why it has none."""

from __future__ import annotations

from typing import Any

from momalisa.collect.sources.text import legible
from momalisa.records import REJECTED, Artwork, Reason

NO_PICTURE = "no picture"


def listed(id: str, image_url: str, problem: str = "", **facts: str) -> Artwork:
    """A work to be asked for; with a `problem`, or at an address that is no UTF-8, a rejected one. Its texts can be stored."""
    address, reason = legible(image_url), Reason.NO_PICTURE if problem else ""
    if address != image_url and not problem:
        problem, reason = f"its address is not UTF-8: {address}; rename it", Reason.REFUSED
    told: dict[str, Any] = {name: legible(text) for name, text in facts.items()}
    return Artwork(legible(id), REJECTED if problem else "", legible(problem), reason, image_url=address, **told)
