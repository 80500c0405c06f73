"""Stable Diffusion 1.4 and BLIP-base at their published sizes, with random weights: our code runs them on a CPU.

It takes 20 GB of memory at most and a few minutes. What the pictures and captions show means nothing here; sizes,
types, memory and files do.
"""

from __future__ import annotations

import gc
import math
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from momalisa.captioner import Captioner, load_processors
from momalisa.captioner.agreement import agreement
from momalisa.checkpoint import LORA_FILE, load_unet
from momalisa.config import Caption, Diffusion, Encode, Settings, Train
from momalisa.engine import Engine, Request
from momalisa.family import Pixels
from momalisa.latents import square
from momalisa.miniature import draw, models
from momalisa.square import Square
from momalisa.storage import Store
from momalisa.training.cache import LatentCache
from momalisa.training.loop import Events, Run, Trainer
from ray_jobs import caption, encode

pytestmark = pytest.mark.slow
GIB = 2**20  # in ru_maxrss's KiB
PROMPT = "A MOMA artwork of: a coffee"
WORK = {"id": "x", "text": PROMPT, "title": "", "artist": "", "medium": ""}


@dataclass(frozen=True)
class FullSize:
    """Folders in `from_pretrained` layout, half precision on disk: 2.1 GB and 0.5 GB."""

    diffusion: Path
    blip: Path
    parameters: dict[str, int]

    @property
    def settings(self) -> Settings:
        return Settings(
            diffusion=Diffusion(model=str(self.diffusion)),
            caption=Caption(model=str(self.blip), max_new_tokens=12),
            encode=Encode(resolution_px=512),
        )


def clip_tokenizer() -> CLIPTokenizer:
    """The miniature's merges in a vocabulary of the published size; the last two tokens begin and end a text."""
    small = models.build_clip_tokenizer()
    tokens = sorted(small.get_vocab(), key=small.get_vocab().__getitem__)[:-2]
    tokens += [f"unused{n}</w>" for n in range(49406 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(pair) for pair in models._bpe_merges(small.backend_tokenizer.to_str())]
    return CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=merges, model_max_length=77)


def bert_tokenizer() -> BertTokenizer:
    """BERT's size and special places. As on the hub it ends before the model's start token, 30522."""
    tokens = ["[PAD]", *(f"[unused{n}]" for n in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += [f"word{n}" for n in range(30522 - len(tokens))]
    return BertTokenizer(vocab={token: n for n, token in enumerate(tokens)})


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # all else: the class's defaults are SD 1.4's


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )


def build_text_encoder() -> CLIPTextModel:
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    special = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, projection_dim=768, **size, **special))


def build_blip() -> BlipForConditionalGeneration:
    text = {"vocab_size": 30524, "num_attention_heads": 12, "bos_token_id": 30522, "sep_token_id": 102, "pad_token_id": 0}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config={"initializer_range": 0.02}))


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FullSize]:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    directory = tmp_path_factory.mktemp("full-size")
    parts = {"unet": build_unet(), "vae": build_vae(), "text": build_text_encoder(), "blip": build_blip()}
    parameters = {name: part.num_parameters() for name, part in parts.items()}
    models.save_diffusion(directory / "diffusion", parts["vae"], parts["unet"], parts["text"], clip_tokenizer())
    parts["blip"].half().save_pretrained(directory / "blip")
    BlipProcessor(BlipImageProcessorPil(), bert_tokenizer()).save_pretrained(directory / "blip")
    parts.clear()
    gc.collect()
    yield FullSize(directory / "diffusion", directory / "blip", parameters)
    shutil.rmtree(directory)  # pytest would keep three


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak < 20 * GIB, f"{peak / GIB:.1f} GiB at the peak"


def pixels(squares: tuple[Square, ...]) -> list[Pixels]:
    picture = draw.draw(draw.all_scenes()[0], seed=1).resize((700, 520))
    return [square(picture).copy()[None] for square in squares]


def test_the_sizes_are_the_published_ones(full_size: FullSize) -> None:
    assert full_size.parameters["unet"] == 859_520_964
    assert full_size.parameters["vae"] == 83_653_863
    assert full_size.parameters["text"] == 123_060_480
    assert full_size.parameters["blip"] == 247_414_076 - 30524 * 768  # the output layer is the embedding, counted once here


def test_a_picture_is_captioned(full_size: FullSize) -> None:
    model = caption.load(full_size.settings, "cpu")
    (row,) = model.rows([{**WORK, "title": "Cup"}], pixels(caption.squares(full_size.settings)))
    assert row["status"] == "ok", row["error"]
    assert row["short"].startswith("A MOMA artwork of: ")
    assert 1 <= len(row["short"].removeprefix("A MOMA artwork of: ").split()) <= 12
    assert row["short"].startswith(row["fused"])  # such words alone fill what CLIP reads


def test_captions_are_word_for_word_those_of_transformers(full_size: FullSize) -> None:
    model = BlipForConditionalGeneration.from_pretrained(full_size.blip, dtype=torch.float32)
    captioner = Captioner(model, *load_processors(full_size.settings.caption), full_size.settings.caption)
    drawn = [draw.draw(scene, seed=1) for scene in draw.all_scenes()[::150]][:4]
    squares = torch.from_numpy(np.stack([captioner.square(picture) for picture in drawn]))
    found = agreement(model, captioner.vision, captioner.decoder, squares)
    print(found)
    assert found.different == 0
    assert found.logits < 1e-3  # fp32, on values up to about 5


def test_a_picture_is_encoded_at_512(full_size: FullSize) -> None:
    model = encode.load(full_size.settings, "cpu")
    (row,) = model.rows([WORK], pixels((square(512),)))
    assert row["status"] == "ok", row["error"]
    assert (row["channels"], row["height"], row["width"]) == (4, 64, 64)
    assert len(row["moments"]) == 64 * 1024
    assert len(row["token_ids"]) == 77
    assert (row["token_ids"][0], row["token_ids"][-1]) == (49406, 49407)


def test_adapters_train_a_step_and_load_again(full_size: FullSize, tmp_path: Path) -> None:
    diffusion, store = full_size.settings.diffusion, Store(str(tmp_path))
    train = Train(images=1, batch=1, workers=1, lora_rank=4, learning_rate=1e-4, gradient_checkpointing=True, threads=2)
    token_ids = torch.full((1, 77), 49407)
    token_ids[0, 0] = 49406
    moments = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 8, 64, 64)).astype(np.float16))
    run = Run("full", train, diffusion, LatentCache(["x"], [PROMPT], moments, token_ids), store)
    saved = []
    progress = Trainer(run, Events(checkpointed=saved.append)).train()
    assert progress.images_seen == 1
    assert math.isfinite(progress.losses[-1][1])
    (checkpoint,) = saved
    assert checkpoint.lora
    assert list(checkpoint.files) == [LORA_FILE]
    gc.collect()
    assert load_unet(store, checkpoint, torch.bfloat16).num_parameters() == 859_520_964


def test_a_picture_is_generated_at_512(full_size: FullSize) -> None:
    engine = Engine.load(full_size.settings.diffusion)
    (made,) = engine.generate([Request(PROMPT, seed=1, steps=1, size_px=512)])
    assert made.size == (512, 512)
    assert np.asarray(made).std() > 0
