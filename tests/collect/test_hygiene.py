import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from momalisa.collect.hygiene import ORIENTATION, UPRIGHT, BadPicture, CleanPicture, clean, fitting
from momalisa.config import Collect

PLAIN = Collect()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def quarters(width: int = 80, height: int = 60) -> Image.Image:
    """Four colours, one in each corner: it shows which way is up."""
    image = Image.new("RGB", (width, height), (220, 30, 30))
    image.paste((30, 180, 30), (width // 2, 0, width, height // 2))
    image.paste((30, 30, 220), (0, height // 2, width // 2, height))
    image.paste((240, 240, 40), (width // 2, height // 2, width, height))
    return image


def pixels(picture: CleanPicture) -> np.ndarray:
    with Image.open(io.BytesIO(picture.bytes)) as image:
        assert image.mode == "RGB"
        assert image.size == (picture.width, picture.height)
        return np.asarray(image, np.float64)


def close(picture: CleanPicture, expected: Image.Image, tolerance: float) -> bool:
    return float(np.abs(pixels(picture) - np.asarray(expected, np.float64)).mean()) < tolerance


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"\xef\xbb\xbf\n <HTML><body>Just a moment", "HTML page"),
        (b"%PDF-1.7 ...", "known format"),
        (b"\xff\xd8\xff", "known format"),
        (bytes(2000), "known format"),
        (encoded(quarters(), "JPEG")[:300], "unreadable header: Truncated"),
        (encoded(quarters(), "JPEG")[:-200], "truncated"),
        (encoded(quarters(), "PNG")[:-30], "truncated"),
        (bomb(60_000, 60_000), "60000x60000 pixels.*max_pixels=120000000"),
        (bomb(12_000, 10_001), "12000x10001 pixels"),  # where Pillow itself would only warn
        (bomb(300_000, 1), "truncated"),
    ],
)
def test_what_is_no_picture_is_rejected_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadPicture, match=reason):
        clean(data, PLAIN)


def test_pillow_s_own_limit_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadPicture):
        clean(bomb(60_000, 60_000), PLAIN)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow tells of corrupt EXIF
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4), st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]))
@settings(max_examples=30, deadline=None)
def test_damage_anywhere_is_a_picture_or_a_reason_and_never_a_crash(at: int, junk: bytes, kind: str) -> None:
    data = bytearray(encoded(quarters(24, 16), kind))
    start = at % len(data)
    data[start : start + len(junk)] = junk
    with suppress(BadPicture):
        clean(bytes(data), PLAIN)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_exif_orientation_is_turned_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = quarters()
    if orientation in UPRIGHT:  # what undoes a quarter turn is the other quarter turn
        undone = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}
        stored = stored.transpose(undone.get(UPRIGHT[orientation], UPRIGHT[orientation]))
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    picture = clean(encoded(stored, kind, exif=exif, **options), PLAIN)
    assert (picture.width, picture.height) == (80, 60)
    assert close(picture, quarters(), 3)


def test_a_picture_in_a_strange_mode_looks_as_it_did() -> None:
    image = quarters()
    for data in (
        encoded(image.convert("CMYK"), "JPEG", quality=95),
        encoded(image.quantize(16), "PNG"),
        encoded(image, "BMP"),
        encoded(image, "TIFF"),
        encoded(image, "WEBP", quality=95),
        encoded(image, "GIF"),
    ):
        assert close(clean(data, PLAIN), image, 6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_pictures_keep_their_brightness(mode: str) -> None:
    grey = Image.new("L", (40, 30), 0)
    grey.paste(255, (20, 0, 40, 30))
    if mode == "I;16":
        data = encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG")
    else:
        data = encoded(grey.convert(mode), "PNG")
    assert close(clean(data, PLAIN), grey.convert("RGB"), 1)


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None, :].repeat(8, axis=0)
    shown = pixels(clean(encoded(Image.fromarray(ramp), "PNG"), PLAIN))
    assert np.abs(shown[0, :, 0] - np.linspace(0, 255, 64)).max() < 1.5


def test_float_tiffs_run_from_zero_to_one() -> None:
    values = np.full((8, 8), 0.5, np.float32)
    assert abs(pixels(clean(encoded(Image.fromarray(values), "TIFF"), PLAIN)).mean() - 128) < 1.5


@pytest.mark.parametrize("matte", ["#ffffff", "#204060"])
def test_transparency_is_put_over_the_matte(matte: str) -> None:
    image = quarters().convert("RGBA")
    image.putalpha(0)
    expected = Image.new("RGB", image.size, matte)
    assert close(clean(encoded(image, "PNG"), Collect(matte=matte)), expected, 0.1)
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([255, 0, 0])
    picture = clean(encoded(palette, "PNG", transparency=0), Collect(matte=matte))
    assert close(picture, expected.resize((20, 20)), 0.1)


def test_an_animation_is_its_first_frame() -> None:
    frames = [quarters().quantize(16), Image.new("RGB", (80, 60), "black").quantize(4)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert close(clean(data, PLAIN), quarters(), 3)


def test_an_icc_profile_is_applied() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")  # its red is blue
    red = Image.new("RGB", (20, 20), (255, 0, 0))
    assert close(clean(encoded(red, "PNG", icc_profile=srgb), PLAIN), red, 1.5)
    seen = pixels(clean(encoded(red, "PNG", icc_profile=swapped), PLAIN)).mean(axis=(0, 1))
    assert seen[2] > 200
    assert seen[0] < 40


@pytest.mark.parametrize("profile", [b"no profile at all", bytes(90)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_broken_icc_profile_is_passed_by_and_dropped(profile: bytes, mode: str) -> None:
    image = quarters().convert(mode)
    picture = clean(encoded(image, "PNG", icc_profile=profile), PLAIN)
    assert close(picture, image.convert("RGB"), 1)
    with Image.open(io.BytesIO(picture.bytes)) as shown:
        assert not shown.info


def test_metadata_is_dropped_and_the_bytes_are_always_the_same() -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken by somebody"
    data = encoded(quarters(900, 700), "JPEG", exif=exif, comment=b"secret", dpi=(72, 72))
    first = clean(data, PLAIN)
    assert first == clean(data, PLAIN)
    assert b"somebody" not in first.bytes
    assert b"secret" not in first.bytes


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [("PNG", (256, 100), "PNG"), ("PNG", (257, 100), "JPEG"), ("JPEG", (64, 64), "JPEG"), ("GIF", (64, 64), "PNG")],
)
def test_small_lossless_pictures_stay_lossless(kind: str, size: tuple[int, int], expected: str) -> None:
    with Image.open(io.BytesIO(clean(encoded(quarters(*size), kind), PLAIN).bytes)) as image:
        assert image.format == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2000))
@settings(max_examples=200, deadline=None)
def test_fitting_never_enlarges_and_keeps_proportions(width: int, height: int, limit: int) -> None:
    new = fitting((width, height), limit)
    assert max(new) == min(max(width, height), limit)
    assert new[0] <= width
    assert new[1] <= height
    scale = max(new) / max(width, height)
    assert abs(new[0] - max(1, width * scale)) <= 0.5 + 1e-6
    assert abs(new[1] - max(1, height * scale)) <= 0.5 + 1e-6
    assert fitting(new, limit) == new


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_picture_is_scaled_down(kind: str) -> None:
    picture = clean(encoded(quarters(2000, 1500), kind), Collect(max_side_px=200))
    assert (picture.width, picture.height) == (200, 150)
    assert close(picture, quarters(200, 150), 3)
