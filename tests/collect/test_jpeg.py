"""Of a JPEG file everything that shows the picture is kept, and nothing else."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from momalisa.collect.jpeg import bare

NOISE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (48, 64, 3), np.uint8))
KINDS = {
    "baseline": {"quality": 90},
    "progressive": {"quality": 90, "progressive": True},
    "restarts": {"quality": 90, "restart_marker_blocks": 2},
    "4:4:4": {"quality": 95, "subsampling": 0},
    "RGB": {"quality": 95, "keep_rgb": True},
}


def encoded(**options: object) -> bytes:
    sink = io.BytesIO()
    NOISE.save(sink, "JPEG", **options)
    return sink.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def told() -> dict[str, object]:
    exif = Image.Exif()
    exif[0x010E] = "taken by somebody"
    return {"exif": exif, "comment": b"a secret", "icc_profile": b"some profile", "xmp": b"<x:xmpmeta/>"}


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_goes_and_every_pixel_stays(kind: str) -> None:
    plain, full = encoded(**KINDS[kind]), encoded(**KINDS[kind], **told())
    assert bare(full) == bare(plain)
    np.testing.assert_array_equal(pixels(bare(full) or b""), pixels(full))
    assert len(full) > len(bare(full) or b"") <= len(plain)
    assert bare(bare(full) or b"") == bare(full)


def test_a_file_with_nothing_to_leave_out_is_not_copied() -> None:
    data = bare(encoded(**told())) or b""
    assert bare(data) is data


def test_what_follows_the_end_goes() -> None:
    data = encoded()
    assert bare(data + b"a video\xff\xd9\xff\xd8" * 50) == bare(data)


def test_bytes_of_ff_may_stand_before_a_marker() -> None:
    data = encoded()
    padded = data[:2] + b"\xff\xff" + data[2:-2] + b"\xff" + data[-2:]
    np.testing.assert_array_equal(pixels(bare(padded) or b""), pixels(data))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9"[:3], b"GIF89a", encoded()[1:], b"\xff\xd8\xff\xe0\x00"])
def test_what_is_no_whole_file_is_none(data: bytes) -> None:
    assert bare(data) is None


@given(st.sampled_from(sorted(KINDS)), st.floats(0, 1, exclude_max=True))
@settings(max_examples=150, deadline=None)
def test_a_file_that_was_cut_is_none(kind: str, kept: float) -> None:
    data = encoded(**KINDS[kind])
    assert bare(data[: int(len(data) * kept)]) is None


@given(st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=8)), max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_file_or_none(damage: list[tuple[int, bytes]]) -> None:
    data = bytearray(encoded(**told()))
    for at, junk in damage:
        data[at % len(data) : at % len(data) + len(junk)] = junk
    found = bare(bytes(data))
    assert found is None or (found.startswith(b"\xff\xd8") and found.endswith(b"\xff\xd9") and len(found) <= len(data))
