"""Stable Diffusion 1.4's architecture with random weights: its sizes and its work, nothing that it has learned."""

from __future__ import annotations

from pathlib import Path


def save(folder: Path) -> Path:
    """Write a whole pipeline folder, 4 GB; the same weights every time."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from momalisa.miniature import models
    from momalisa.training.memory import SD_1_UNET, build

    torch.manual_seed(0)
    tokenizer = models.build_clip_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **text, **special))
    models.save_diffusion(folder, vae, build(SD_1_UNET), encoder, tokenizer)
    return folder
