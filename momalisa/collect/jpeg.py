"""A JPEG file's segments (ITU-T T.81, annex B): those that make the picture, and those that only tell about it."""

from __future__ import annotations

import re

START, END, SCAN, COMMENT = 0xD8, 0xD9, 0xDA, 0xFE
JFIF, ADOBE = (0xE0, b"JFIF\0"), (0xEE, b"Adobe")  # these two say how colours are stored
MARKER = re.compile(rb"\xff+[\x01-\xfe]")  # any number of FF may stand before it
AFTER_PIXELS = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # among coded pixels FF00 is a value, and FFD0 to FFD7 are restarts


def bare(data: bytes) -> bytes | None:
    """The file without metadata, and without what follows its end; None of what is no whole sequence of segments.

    A file that has nothing of that is returned as it is, not copied.
    """
    kept, at = [memoryview(b"\xff\xd8")], 2
    if not data.startswith(b"\xff\xd8"):
        return None
    view = memoryview(data)
    while found := MARKER.match(data, at):
        marker, start = data[found.end() - 1], found.end() - 2
        if marker == END:
            size = sum(map(len, kept)) + 2
            return data if size == len(data) else b"".join([*kept, b"\xff\xd9"])
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == SCAN:
            after = AFTER_PIXELS.search(data, end)
            if after is None:
                return None
            end = after.start()
        if not _tells(marker, data[start + 4 : start + 9]):
            kept.append(view[start:end])
        at = end
    return None


def _tells(marker: int, name: bytes) -> bool:
    """Whether a segment holds nothing that decoding needs."""
    return marker == COMMENT or (0xE0 <= marker <= 0xEF and (marker, name) not in (JFIF, ADOBE))
