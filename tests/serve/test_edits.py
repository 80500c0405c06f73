"""Pictures that visitors send, over the real generator: edits, masks, and everything that is no picture."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import zlib
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from momalisa.collect.hygiene import ORIENTATION
from serve import uploads
from serve.errors import ApiError
from serve.png import read
from tests.serve.conftest import LIMITS

PATH = "/v1/images/edits"


def png(size: tuple[int, int] = (64, 64), colour: Any = (200, 30, 30), mode: str = "RGB") -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, colour).save(sink, "PNG")
    return sink.getvalue()


def mask_of(size: tuple[int, int] = (64, 64), upper: bool = False) -> bytes:
    """Its right half, or its upper one, is transparent: to be painted again."""
    picture = Image.new("RGBA", size, (0, 0, 0, 255))
    half = (0, 0, size[0], size[1] // 2) if upper else (size[0] // 2, 0, size[0], size[1])
    ImageDraw.Draw(picture).rectangle(half, (0, 0, 0, 0))
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


async def edit(client: httpx.AsyncClient, image: bytes | None = None, mask: bytes | None = None, **fields: str) -> httpx.Response:
    files = {"image": ("a.png", image or png(), "image/png")} | ({"mask": ("m.png", mask, "image/png")} if mask else {})
    return await client.post(PATH, data={"prompt": "a boat", "seed": "3", **fields}, files=files)


def pixels(answer: httpx.Response) -> tuple[Image.Image, dict[str, str]]:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image, read(data)


async def test_an_edit_says_how_it_was_made(client: httpx.AsyncClient) -> None:
    image, fields = pixels(await edit(client, steps="4", strength="0.5", sampler="ddim", n="2"))
    assert image.size == (64, 64)
    assert (fields["strength"], fields["sampler"], fields["steps"]) == ("0.5", "ddim", "4")
    assert len(fields["image"]) == 64


async def test_another_picture_or_another_mask_is_another_result(client: httpx.AsyncClient) -> None:
    red, blue = [pixels(await edit(client, png(colour=colour), steps="4"))[0] for colour in ("red", "blue")]
    masked, fields = pixels(await edit(client, png(colour="red"), mask_of(), steps="4", strength="0.8"))
    assert len({red.tobytes(), blue.tobytes(), masked.tobytes()}) == 3
    assert "mask" in fields


def test_openais_transparent_is_the_engines_white() -> None:
    image, mask = uploads.prepare(uploads.Form({}, png(), mask_of()), 64, LIMITS)
    assert mask is not None
    opened = Image.open(io.BytesIO(mask))
    assert (opened.mode, opened.getpixel((5, 5)), opened.getpixel((60, 5))) == ("L", 0, 255)
    assert Image.open(io.BytesIO(image)).mode == "RGB"


def test_the_pictures_own_transparency_is_a_mask_and_none_is_none() -> None:
    own = uploads.prepare(uploads.Form({}, mask_of(), None), 64, LIMITS)[1]
    assert own is not None
    assert Image.open(io.BytesIO(own)).getextrema() == (0, 255)
    assert uploads.prepare(uploads.Form({}, png(colour=(1, 2, 3, 255), mode="RGBA"), None), 64, LIMITS)[1] is None


AS_STORED = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def stored(upright: Image.Image, orientation: int) -> bytes:
    """A picture as a camera that was held so writes it."""
    turn, exif, sink = AS_STORED[orientation], Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    (upright if turn is None else upright.transpose(turn)).save(sink, "PNG", exif=exif)
    return sink.getvalue()


def corner(mode: str, ground: Any, colour: Any) -> Image.Image:
    """120x80; its upper left quarter is another colour."""
    picture = Image.new(mode, (120, 80), ground)
    picture.paste(colour, (0, 0, 60, 40))
    return picture


@pytest.mark.parametrize("orientation", AS_STORED)
def test_a_mask_lies_where_it_was_painted_however_the_camera_was_held(orientation: int) -> None:
    photograph = stored(corner("RGB", "black", "white"), orientation)
    hole = corner("RGBA", (0, 0, 0, 255), (0, 0, 0, 0))
    own = uploads.Form({}, stored(hole, orientation), None)
    for form in (
        uploads.Form({}, photograph, stored(hole, 1)),  # painted on what the phone shows
        uploads.Form({}, photograph, stored(hole, orientation)),  # written as the photograph is
        own,
    ):
        image, mask = uploads.prepare(form, 64, LIMITS)
        assert mask is not None
        quarter = [Image.open(io.BytesIO(mask)).getpixel(place) for place in ((8, 8), (55, 8), (8, 55), (55, 55))]
        assert quarter == [255, 0, 0, 0]
        if form is not own:
            seen = [Image.open(io.BytesIO(image)).getpixel(place) for place in ((8, 8), (55, 8), (8, 55), (55, 55))]
            assert seen == [(255, 255, 255), (0, 0, 0), (0, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_mask_of_the_stored_size_is_not_laid_on_sideways(orientation: int) -> None:
    photograph = stored(corner("RGB", "black", "white"), orientation)
    sideways = stored(corner("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)).transpose(Image.Transpose.ROTATE_90), 1)
    with pytest.raises(ApiError, match=r"the mask is 80x120, the picture 120x80"):
        uploads.prepare(uploads.Form({}, photograph, sideways), 64, LIMITS)


@pytest.mark.parametrize("size", [(200, 100), (8, 8), (64, 300)])
def test_any_proportions_become_the_engines_square(size: tuple[int, int]) -> None:
    image, mask = uploads.prepare(uploads.Form({}, png(size), mask_of(size)), 48, LIMITS)
    assert mask is not None
    assert Image.open(io.BytesIO(image)).size == Image.open(io.BytesIO(mask)).size == (48, 48)


@pytest.mark.parametrize(
    ("image", "mask", "param", "message"),
    [
        (b"no picture", None, "image", "not a picture in a known format"),
        (b"<html>", None, "image", "an HTML page"),
        (bomb(), None, "image", "60000x60000 pixels in its header"),
        (png()[:60], None, "image", "truncated or damaged"),
        (png((4, 4)), None, "image", "less than min_side_px=8"),
        (png(), mask_of((32, 32)), "mask", "the mask is 32x32, the picture 64x64 (upright)"),
        (png(), png(), "mask", "has no transparency"),
        (png(), bomb(), "mask", "60000x60000"),
        (png(), b"?", "mask", "not a picture"),
    ],
)
async def test_what_is_no_picture_is_said(
    client: httpx.AsyncClient, image: bytes, mask: bytes | None, param: str, message: str
) -> None:
    answer = await edit(client, image, mask)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"steps": "many"}, "steps"),
        ({"steps": "1e3"}, "steps"),
        ({"steps": "9" * 30}, "steps"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"guidance_scale": "1e999"}, "guidance_scale"),
        ({"strength": "0"}, "strength"),
        ({"strength": "1.5"}, "strength"),
        ({"strength": "0.01", "steps": "4"}, "strength"),
        ({"sampler": "plms"}, "sampler"),
        ({"size": "60x60"}, "size"),
        ({"prompt": " "}, "prompt"),
        ({"stream": "maybe"}, "stream"),
    ],
)
async def test_wrong_form_fields_are_named(client: httpx.AsyncClient, fields: dict[str, str], param: str) -> None:
    answer = await edit(client, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_forms_that_are_none(client: httpx.AsyncClient) -> None:
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    cases: list[tuple[bytes, dict[str, str], str | None]] = [
        (b"", multipart, "image"),
        (b"--x\r\nnonsense", multipart, None),
        (b"--x\r\n\r\n\r\n--x--", multipart, None),
        (b"{}", {"Content-Type": "application/json"}, None),
        (b"{}", {"Content-Type": "multipart/form-data"}, None),
        (b'--x\r\nContent-Disposition: form-data; name="prompt"; filename="\xff\xfe"\r\n\r\n\xff\r\n--x--\r\n', multipart, None),
    ]
    for body, headers, param in cases:
        answer = await client.post(PATH, content=body, headers=headers)
        assert answer.status_code == 400, (body, answer.text)
        assert param is None or answer.json()["error"]["param"] == param
    two = await client.post(PATH, data={"prompt": "x"}, files=[("image[]", png()), ("image[]", png())])
    assert (two.status_code, two.json()["error"]["param"]) == (400, "image")


async def test_uploads_are_bounded(client: httpx.AsyncClient) -> None:
    answer = await edit(client, b"x" * (LIMITS.max_upload_bytes + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    answer = await edit(client, b"x" * (2 * LIMITS.max_upload_bytes))
    assert answer.status_code == 413


@given(data=st.binary(max_size=300) | st.binary(max_size=60).map(lambda tail: png()[:40] + tail))
@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_bytes_make_it_fail(data: bytes) -> None:
    for form in (uploads.Form({}, data, None), uploads.Form({}, png(), data)):
        with contextlib.suppress(ApiError):
            uploads.prepare(form, 64, LIMITS)
