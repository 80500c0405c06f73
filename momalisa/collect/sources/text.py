"""Text as museums write it -> text on one line."""

from __future__ import annotations

import re

TAG = re.compile(r"</?(?:em|i|b|strong|sub|sup|br|p)\b[^>]*>", re.IGNORECASE)


def legible(text: str) -> str:
    """Text that can be stored: of a file name that is no UTF-8, or half a pair of surrogates, the code (`caf\\udce9`)."""
    return text.encode("utf-8", "backslashreplace").decode()


def plain(text: str) -> str:
    """Text on one line, without inline tags."""
    return " ".join(TAG.sub("", text).split())
