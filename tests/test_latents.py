"""Pictures and texts become what diffusers' own pipeline makes of them; the scaling factor is applied once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from momalisa.config import Caption, Diffusion, Encode, Settings
from momalisa.latents import PREPROCESSING, Autoencoder, TextEncoder, encoder_id, sample, to_pictures, to_pixels
from momalisa.weights import identity, short_id

TEXTS = ["A MOMA artwork of: a coffee", "", "🎨🖼️", "一幅画", "Ünïcode \x00 \n text", "word " * 300]


@pytest.fixture
def diffusion(tiny_base: Path) -> Diffusion:
    return Diffusion(model=str(tiny_base))


def test_moments_and_sampling_equal_diffusers(diffusion: Diffusion) -> None:
    autoencoder = Autoencoder.load(diffusion)
    vae = AutoencoderKL.from_pretrained(diffusion.model, subfolder="vae", dtype=torch.float32)
    assert (autoencoder.factor, autoencoder.channels, autoencoder.scaling_factor) == (8, 4, vae.config.scaling_factor)
    pixels = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = autoencoder.encode(pixels)
    assert (moments.shape, moments.dtype, moments.device.type) == ((2, 8, 8, 6), torch.float16, "cpu")
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(2))
    latents = sample(moments, noise, autoencoder.scaling_factor)
    expected = posterior.sample(torch.Generator().manual_seed(2)) * vae.config.scaling_factor
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, rtol=2e-3, atol=2e-3)


def test_decoding_undoes_the_scale_once(diffusion: Diffusion) -> None:
    autoencoder = Autoencoder.load(diffusion)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = autoencoder.vae.decode(latents / autoencoder.vae.config.scaling_factor).sample
    pixels = autoencoder.decode(latents.half())
    assert (pixels.shape, pixels.dtype) == ((2, 3, 64, 64), torch.float32)
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1), rtol=2e-3, atol=2e-3)
    wild = autoencoder.decode(latents * 1e4)
    assert wild.min() >= 0
    assert wild.max() <= 1


def test_an_extreme_log_variance_is_limited() -> None:
    moments = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[[[-1000.0, 1000.0]]]])], dim=1)
    low, high = sample(moments, torch.ones(1, 1, 1, 2), 2.0).flatten().tolist()
    assert low == pytest.approx(2 * np.exp(-15))
    assert high == pytest.approx(2 * np.exp(10))


def test_a_size_that_does_not_divide_is_refused(diffusion: Diffusion) -> None:
    with pytest.raises(ValueError, match="60x64 pixels cannot be encoded: both must be multiples of 8"):
        Autoencoder.load(diffusion).encode(torch.zeros(1, 3, 64, 60))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_embeds_as_in_the_pipeline(diffusion: Diffusion, text: str) -> None:
    encoder = TextEncoder.load(diffusion)
    ids = encoder.tokenize([text])
    assert (ids.shape, ids.dtype) == ((1, 77), torch.int64)
    assert int(ids.max()) < encoder.model.config.vocab_size
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion.model, safety_checker=None, dtype=torch.float32)
    expected, _ = pipeline.encode_prompt(text, "cpu", 1, False)
    embedded = encoder.embed(ids)
    assert not embedded.requires_grad
    torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-6)


def test_no_texts_have_no_tokens(diffusion: Diffusion) -> None:
    assert TextEncoder.load(diffusion).tokenize([]).shape == (0, 77)


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (7, 300), (64, 64), (1, 1)])
def test_pixels_are_the_scaled_centre(size: tuple[int, int]) -> None:
    pixels = to_pixels(Image.new("RGB", size, (255, 128, 0)), 64)
    assert (pixels.shape, pixels.dtype) == ((3, 64, 64), torch.float32)
    torch.testing.assert_close(pixels.mean(dim=(1, 2)), torch.tensor([1.0, 128 / 127.5 - 1, -1.0]))


def test_the_edges_are_cut_not_the_centre() -> None:
    picture = Image.new("L", (300, 100), 0)
    picture.paste(255, (100, 0, 200, 100))
    assert to_pixels(picture, 64).min() > 0.9


def test_scaling_down_is_antialiased() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (512, 256)))
    assert to_pixels(stripes, 64)[:, 8:-8, 8:-8].abs().max() < 0.05


def test_pictures_and_pixels_are_inverse() -> None:
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (picture,) = to_pictures(to_pixels(Image.fromarray(array), 64)[None] / 2 + 0.5)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), array)


def test_the_id_follows_what_shapes_a_latent(tiny_base: Path, tmp_path: Path) -> None:
    settings = Settings(diffusion=Diffusion(model=str(tiny_base)), caption=Caption(model="a/b"))
    name = encoder_id(settings, "captions")
    assert len(name) == 12
    assert name == encoder_id(settings.model_copy(update={"encode": Encode(batch=3, actors=2)}), "captions")
    others = {
        encoder_id(settings, "others"),
        encoder_id(settings.model_copy(update={"encode": Encode(resolution_px=256)}), "captions"),
        encoder_id(settings.model_copy(update={"encode": Encode(mirrored=True)}), "captions"),
        encoder_id(settings.model_copy(update={"diffusion": Diffusion(model="a/b")}), "captions"),
        encoder_id(settings.model_copy(update={"diffusion": Diffusion(model="a/b", revision="c")}), "captions"),
        name,
    }
    assert len(others) == 6
    parts = tuple(identity(str(tiny_base / part)) for part in ("vae", "text_encoder", "tokenizer"))
    assert name == short_id("encoder", PREPROCESSING, parts, None, 512, "captions")  # families of before keep their names
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    moved = settings.model_copy(update={"diffusion": Diffusion(model=str(copy))})
    assert encoder_id(moved, "captions") == name
    shutil.rmtree(copy / "unet")
    assert encoder_id(moved, "captions") == name


def test_the_id_follows_the_weights(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    with open(copy / "vae" / "diffusion_pytorch_model.safetensors", "ab") as file:
        file.write(b"\0")
    one, other = (Settings(diffusion=Diffusion(model=str(path))) for path in (tiny_base, copy))
    assert encoder_id(one, "captions") != encoder_id(other, "captions")
