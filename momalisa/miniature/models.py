"""The miniature family: the architectures of Stable Diffusion, BLIP and CLIP at a few million parameters.

Each is built from the same classes as its big relative and saved in the same layout, so that nothing but a
path distinguishes `miniature://diffusion` from `CompVis/stable-diffusion-v1-4`.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
)

from momalisa.config import EVALUATION_PROMPTS
from momalisa.miniature import draw

WIDTH = 128
TEXT_LENGTH = 77  # tokens, as Stable Diffusion 1.4's text encoder
EVALUATION_PREFIX = "A MOMA artwork of: "
EVALUATION_SUBJECTS = tuple(prompt.removeprefix(EVALUATION_PREFIX) for prompt in EVALUATION_PROMPTS)


def corpus() -> list[str]:
    """Every text the miniature models are trained on, for the tokenizers' vocabularies."""
    return [*(EVALUATION_PREFIX + scene.caption for scene in draw.all_scenes()), *EVALUATION_SUBJECTS]


def build_clip_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE as CLIP's: any text in any script has tokens, and none is unknown."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Named first, they have fixed ids: else pairs of equal count are merged in another order on every run.
    first = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=1024 + 256, show_progress=False, special_tokens=first, end_of_word_suffix="</w>", continuing_subword_prefix=""
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    learned = Tokenizer.to_str(tokenizer)
    merges = [tuple(pair) for pair in _bpe_merges(learned)]
    tokens = [*dict.fromkeys([*first, *("".join(pair) for pair in merges)]), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def _bpe_merges(serialised: str) -> list[list[str]]:
    return list(json.loads(serialised)["model"]["merges"])


def build_blip_tokenizer() -> BertTokenizer:
    """A WordPiece vocabulary of our words and of single printable characters; the rest is `[UNK]`."""
    words = sorted({word.strip(",:") for text in corpus() for word in text.lower().split()})
    characters = [c for c in string.printable if c.isprintable() and not c.isspace() and not c.isupper()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *characters, *("##" + c for c in characters if c.isalnum()), *words, "[DEC]"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]", model_max_length=64)  # noqa: S106


def build_vae() -> AutoencoderKL:
    """KL autoencoder, 8x8 pixels to one place of 4 channels: 128x128 -> 4x16x16."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=draw.SIZE_PX,
    )


def build_unet() -> UNet2DConditionModel:
    """Conditional UNet on 4x16x16 latents; text enters at the 8x8 level."""
    return UNet2DConditionModel(
        sample_size=draw.SIZE_PX // 8,
        block_out_channels=(64, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # heads, as in Stable Diffusion 1.x (the library's historical naming)
        cross_attention_dim=WIDTH,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Contrastive pair of encoders; its text half becomes the diffusion model's text encoder."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": draw.SIZE_PX,
        "patch_size": 16,
        "projection_dim": WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def build_blip(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    """Image captioner: a small ViT and a three-layer decoder with cross-attention."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": draw.SIZE_PX,
        "patch_size": 16,
        "initializer_range": 0.02,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "encoder_hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def build_scheduler() -> PNDMScheduler:
    """Stable Diffusion 1.4's published schedule, to the letter."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        set_alpha_to_one=False,
        skip_prk_steps=True,
    )


def clip_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    side = {"height": draw.SIZE_PX, "width": draw.SIZE_PX}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": draw.SIZE_PX}, crop_size=side)
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def blip_processor(tokenizer: BertTokenizer) -> BlipProcessor:
    side = {"height": draw.SIZE_PX, "width": draw.SIZE_PX}
    return BlipProcessor(image_processor=BlipImageProcessorPil(size=side), tokenizer=tokenizer)


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """CLIP's text half as the stand-alone module a diffusion pipeline loads."""
    encoder = CLIPTextModel(clip.config.text_config)
    weights = {name: value for name, value in clip.state_dict().items() if name.startswith("text_model.")}
    expected = encoder.state_dict()
    if set(expected) != set(weights):  # the class may hold its layers without the prefix
        weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    encoder.load_state_dict(weights)
    return encoder.eval()


def save_diffusion(
    directory: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Write a `StableDiffusionPipeline` folder in fp16 safetensors."""
    pipeline = StableDiffusionPipeline(
        vae=vae.to(torch.float16),
        text_encoder=text_encoder.to(torch.float16),
        tokenizer=tokenizer,
        unet=unet.to(torch.float16),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
