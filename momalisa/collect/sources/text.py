"""Text as museums write it -> text on one line."""

from __future__ import annotations

import re

TAG = re.compile(r"</?(?:em|i|b|strong|sub|sup|br|p)\b[^>]*>", re.IGNORECASE)


def plain(text: str) -> str:
    """Text on one line, without inline tags."""
    return " ".join(TAG.sub("", text).split())
