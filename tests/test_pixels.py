"""What BLIP sees is what its own processor shows it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipImageProcessorPil

from momalisa.pixels import BlipPixels

PROCESSOR = BlipImageProcessorPil()
LEVEL = 1 / 255 / 0.2613  # of 255, on the scale of normalised values


def picture(width: int, height: int) -> Image.Image:
    """Soft shapes with hard edges and some grain."""
    rng = np.random.default_rng(width * 10_000 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (height, width, 1))
    values[height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 20)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def expected(data: bytes, processor: BlipImageProcessorPil = PROCESSOR) -> torch.Tensor:
    shown: torch.Tensor = processor(images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt").pixel_values[0]
    return shown


def levels(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Mean and largest difference, in levels of 255."""
    difference = (one - other).abs() / LEVEL
    return float(difference.mean()), float(difference.max())


@pytest.mark.parametrize("size", [(1024, 700), (640, 480), (384, 384), (120, 90), (30, 900)])
def test_without_a_reduced_decode_it_is_the_processor_s_own(size: tuple[int, int]) -> None:
    for data in (encoded(picture(*size), quality=95), encoded(picture(*size), "PNG")):
        made = BlipPixels.of(PROCESSOR, exact=True)(data)
        assert (made.shape, made.dtype, made.is_contiguous()) == ((3, 384, 384), torch.float32, True)
        mean, most = levels(made, expected(data))
        assert mean < 0.5
        assert most < 10


@pytest.mark.parametrize("size", [(1024, 800), (2000, 1600), (4000, 900)])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(size: tuple[int, int]) -> None:
    data = encoded(picture(*size), quality=95)
    with Image.open(io.BytesIO(data)) as image:
        made = BlipPixels.of(PROCESSOR).of_picture(image)
        assert min(image.size) < min(size)
        assert min(image.size) >= 384
    assert levels(made, expected(data))[0] < 4


def test_a_picture_too_large_to_be_lent_is_the_same() -> None:
    data = encoded(picture(2600, 1800), "PNG")  # 18 MB
    assert levels(BlipPixels.of(PROCESSOR)(data), expected(data))[0] < 0.5


def test_a_tensor_outlives_its_picture() -> None:
    data = encoded(picture(384, 384), "PNG")
    made = BlipPixels.of(PROCESSOR)(data)
    kept = made.clone()
    for _ in range(20):
        BlipPixels.of(PROCESSOR)(encoded(Image.new("RGB", (384, 384)), "PNG"))
    assert torch.equal(made, kept)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb_as_it_does_there(mode: str) -> None:
    image = picture(500, 300).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert levels(BlipPixels.of(PROCESSOR)(data), expected(data))[0] < 0.5


def test_a_batch_is_its_pictures() -> None:
    pictures = [encoded(picture(200 + 50 * number, 300)) for number in range(3)]
    pixels = BlipPixels.of(PROCESSOR)
    made = pixels.batch(pictures)
    assert made.shape == (3, 3, 384, 384)
    assert all(torch.equal(row, pixels(data)) for row, data in zip(made, pictures, strict=True))
    assert pixels.batch([]).shape == (0, 3, 384, 384)


def test_another_processor_is_followed() -> None:
    other = BlipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    data = encoded(picture(100, 80), "PNG")
    assert float((BlipPixels.of(other)(data) - expected(data, other)).abs().max()) < 10 / 255 / 0.5


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"resample": 2}, {"size": {"height": 32, "width": 48}}])
def test_a_processor_that_does_something_else_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="bicubic squares"):
        BlipPixels.of(BlipImageProcessorPil(**change))


def test_no_picture_is_an_error_without_an_address() -> None:
    with pytest.raises(ValueError, match=r"^3 bytes that are no picture in a known format$"):
        BlipPixels.of(PROCESSOR)(b"abc")
