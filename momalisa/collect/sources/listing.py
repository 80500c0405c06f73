"""What a source says of one work: where its picture is, or why it has none."""

from __future__ import annotations

from typing import Any

from momalisa.records import REJECTED, Artwork, Reason

NO_PICTURE = "no picture"


def listed(id: str, image_url: str, problem: str = "", **facts: Any) -> Artwork:
    """A work to be asked for; with a `problem`, a rejected one."""
    reason = Reason.NO_PICTURE if problem else ""
    return Artwork(id=id, status=REJECTED if problem else "", error=problem, reason=reason, image_url=image_url, **facts)
