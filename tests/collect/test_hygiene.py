import io
import struct
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from momalisa.collect import hygiene
from momalisa.collect.hygiene import ORIENTATION, UPRIGHT, BadPicture, CleanPicture, clean, fitting
from momalisa.collect.phash import THUMBNAIL_BYTES
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
        (bomb(300_000, 1), "300000x1 pixels in its header, less than min_side_px=8"),
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


def frames(count: int = 3) -> list[Image.Image]:
    return [quarters(24, 16).rotate(90 * number) for number in range(count)]


def pages(kind: str, **options: object) -> bytes:
    """Several pictures in one file."""
    first, *rest = frames()
    return encoded(first, kind, save_all=True, append_images=rest, **options)


def sixteen_bit_rgb(colour: tuple[int, int, int], size: int = 16) -> bytes:
    """A PNG with 16 bits a channel, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = (b"\0" + struct.pack(">3H", *colour) * size) * size
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def large_exif() -> bytes:
    """Sixty thousand bytes of tags, as much as a JPEG holds."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010E] = "x" * 60_000
    return encoded(quarters(24, 16), "JPEG", exif=exif)


def specimens() -> dict[str, bytes]:
    """Small files of every kind that hygiene opens, the strange ones too."""
    small = quarters(24, 16)
    alpha = small.copy()
    alpha.putalpha(90)
    return {
        **{kind: encoded(small, kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP")},
        "progressive": encoded(small, "JPEG", progressive=True),
        "cmyk": encoded(small.convert("CMYK"), "JPEG"),
        "cmyk tiff": encoded(small.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "lab": encoded(ImageCms.profileToProfile(small, SRGB_PROFILE, LAB_PROFILE, outputMode="LAB"), "TIFF"),
        "palette": encoded(small.quantize(16), "PNG", transparency=3),
        "alpha": encoded(alpha, "PNG"),
        "grey alpha": encoded(alpha.convert("LA"), "PNG"),
        "alpha webp": encoded(alpha, "WEBP", lossless=True),
        "16 bit": encoded(Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 170), "PNG"),
        "16 bit rgb": sixteen_bit_rgb((40_000, 20_000, 60_000)),
        "float": encoded(Image.fromarray(np.full((16, 24), 0.5, np.float32)), "TIFF"),
        "mpo": pages("MPO"),
        "animated gif": pages("GIF"),
        "animated webp": pages("WEBP"),
        "animated png": pages("PNG"),
        "pages": pages("TIFF", compression="tiff_deflate"),
        "profile": encoded(small, "JPEG", icc_profile=SRGB),
        "exif": large_exif(),
    }


SRGB_PROFILE, LAB_PROFILE = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
SRGB = ImageCms.ImageCmsProfile(SRGB_PROFILE).tobytes()
SPECIMENS = specimens()


def judged(data: bytes, chosen: Collect = PLAIN) -> None:
    """A picture that is one, or a reason."""
    try:
        picture = clean(data, chosen)
    except BadPicture as bad:
        reason = str(bad)
    else:
        assert pixels(picture).shape == (picture.height, picture.width, 3)
        assert max(picture.width, picture.height) <= chosen.max_side_px
        assert (len(picture.phash), len(picture.thumbnail)) == (16, THUMBNAIL_BYTES)
        return
    assert reason
    assert "0x" not in reason  # an address would make each run's row another one


@pytest.mark.parametrize("kind", SPECIMENS)
def test_every_kind_is_a_picture_and_the_same_each_time(kind: str) -> None:
    judged(SPECIMENS[kind])
    assert clean(SPECIMENS[kind], PLAIN) == clean(SPECIMENS[kind], PLAIN)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow tells of corrupt EXIF
@given(
    st.sampled_from(sorted(SPECIMENS)),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=6)), max_size=4),
    st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_damage_anywhere_is_a_picture_or_a_reason_and_never_a_crash(
    kind: str, damage: list[tuple[int, bytes]], kept: float
) -> None:
    data = bytearray(SPECIMENS[kind])
    for at, junk in damage:
        start = at % len(data)
        data[start : start + len(junk)] = junk
    judged(bytes(data) if kept > 0.5 else bytes(data[: round(len(data) * 2 * kept)]), Collect(max_pixels=1_000_000))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"II*\0", b"MM\0*", b"BM"]),
    st.binary(max_size=400),
)
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_picture_or_a_reason(magic: bytes, data: bytes) -> None:
    judged(magic + data, Collect(max_pixels=1_000_000))


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
        encoded(ImageCms.profileToProfile(image, SRGB_PROFILE, LAB_PROFILE, outputMode="LAB"), "TIFF"),
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
    assert close(clean(encoded(image.convert("LA"), "PNG"), Collect(matte=matte)), expected, 0.1)
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([255, 0, 0])
    picture = clean(encoded(palette, "PNG", transparency=0), Collect(matte=matte))
    assert close(picture, expected.resize((20, 20)), 0.1)


@pytest.mark.parametrize("kind", ["animated gif", "animated webp", "animated png", "pages", "mpo"])
def test_of_several_pictures_in_a_file_the_first_is_taken(kind: str) -> None:
    assert close(clean(SPECIMENS[kind], PLAIN), frames()[0], 30)
    assert not close(clean(SPECIMENS[kind], PLAIN), frames()[2], 30)


@pytest.mark.parametrize("kind", ["animated gif", "animated webp", "animated png", "pages"])
def test_or_the_file_is_rejected(kind: str) -> None:
    with pytest.raises(BadPicture, match=r"an animation or several pages .*animated=reject"):
        clean(SPECIMENS[kind], Collect(animated="reject"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "JPEG", "mpo"])
def test_a_single_picture_is_no_animation(kind: str) -> None:
    assert clean(SPECIMENS[kind], Collect(animated="reject")) == clean(SPECIMENS[kind], PLAIN)


def test_sixteen_bits_a_channel_keep_their_colour() -> None:
    assert np.abs(pixels(clean(SPECIMENS["16 bit rgb"], PLAIN)) - (40_000 / 257, 20_000 / 257, 60_000 / 257)).max() < 1.5


def test_cmyk_as_adobe_writes_it_is_not_inverted() -> None:
    data = encoded(Image.new("CMYK", (24, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(pixels(clean(data, PLAIN)).mean((0, 1)) - (255, 0, 0)).max() < 6


def test_a_transparent_shade_of_sixteen_bit_grey_shows_the_matte() -> None:
    values = np.full((16, 16), 30_000, np.uint16)
    values[:, 8:] = 60_000
    seen = pixels(clean(encoded(Image.fromarray(values), "PNG", transparency=30_000), Collect(matte="#ff0000")))
    assert tuple(seen[8, 2]) == (255, 0, 0)
    assert abs(seen[8, 14, 1] - 60_000 / 257) < 1


def test_the_edge_of_what_is_transparent_takes_no_colour_from_behind_it() -> None:
    picture = Image.new("RGBA", (512, 512), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 250, 512))
    seen = pixels(clean(encoded(picture, "PNG"), Collect(max_side_px=64, matte="#0000ff")))
    assert seen[..., 0].max() < 3


def test_sixteen_bits_take_a_bounded_share_of_memory() -> None:
    data = encoded(Image.fromarray(np.zeros((3000, 4000), np.uint16)), "PNG")
    tracemalloc.start()
    clean(data, PLAIN)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 12_000_000 + 64_000_000  # what is decoded, what it becomes, and strips


def test_large_pictures_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hygiene, "LARGE_PIXELS", 1000)
    inside, most, load = 0, 0, Image.Image.resize

    def watched(self: Image.Image, *arguments: object, **options: object) -> Image.Image:
        nonlocal inside, most
        inside += "reducing_gap" in options and self.width == 80
        most = max(most, inside)
        time.sleep(0.01)
        inside -= "reducing_gap" in options and self.width == 80
        return load(self, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    data = encoded(quarters(), "PNG")
    threads = [threading.Thread(target=clean, args=(data, Collect(max_side_px=40))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_an_icc_profile_is_applied() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = swapped_colours()
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


def photograph(width: int = 640, height: int = 480) -> Image.Image:
    """Soft colours with grain."""
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (height, width, 1))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def as_it_was(data: bytes, **chosen: object) -> bool:
    """Whether the stored picture has the very pixels that the file has."""
    picture = clean(data, Collect.model_validate(chosen))
    with Image.open(io.BytesIO(data)) as image:
        return picture.width == image.width and bool((pixels(picture) == np.asarray(image.convert("RGB"))).all())


def swapped_colours() -> bytes:
    """A profile whose red is blue."""
    return SRGB.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"icc_profile": SRGB}, {"icc_profile": b"broken"}, {"comment": b"x"}]
)
def test_a_clean_jpeg_keeps_its_own_pixels(options: dict[str, object]) -> None:
    data = encoded(photograph(), "JPEG", quality=70, **options)
    assert as_it_was(data)
    assert len(clean(data, PLAIN).bytes) <= len(data)
    assert as_it_was(data, max_side_px=640)


def test_what_needs_mending_is_encoded_again() -> None:
    turned = Image.Exif()
    turned[ORIENTATION] = 3
    for options in ({"exif": turned}, {"icc_profile": swapped_colours()}):
        assert not as_it_was(encoded(photograph(), "JPEG", quality=70, **options))
    assert not as_it_was(encoded(photograph(), "JPEG", quality=70), max_side_px=639)
    with Image.open(io.BytesIO(clean(encoded(photograph().convert("L"), "JPEG"), PLAIN).bytes)) as grey:
        assert grey.mode == "RGB"


def test_a_picture_looks_the_same_whichever_way_it_was_cleaned() -> None:
    for size in ((1000, 700), (640, 480), (120, 90)):
        data = encoded(photograph(*size), "JPEG", quality=95, subsampling=0)
        kept = clean(data, PLAIN)
        again = clean(encoded(photograph(*size), "PNG"), PLAIN)
        assert (int(kept.phash, 16) ^ int(again.phash, 16)).bit_count() <= 2
        difference = np.frombuffer(kept.thumbnail, np.uint8).astype(int) - np.frombuffer(again.thumbnail, np.uint8)
        assert np.abs(difference).max() <= 12


@given(st.floats(0, 1, exclude_max=True), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_jpeg_that_was_cut_is_rejected_and_never_kept(kept: float, progressive: bool) -> None:
    data = encoded(photograph(320, 240), "JPEG", progressive=progressive)
    cut = data[: int((len(data) - 2) * kept)]  # at least the end marker and a byte before it are gone
    with pytest.raises(BadPicture, match=r"truncated|known format|empty|unreadable"):
        clean(cut, PLAIN)


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
