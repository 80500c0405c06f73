"""Tiny models: the real classes with random weights, in their real folders, for tests and benches of what is around them."""

from __future__ import annotations

from pathlib import Path


def save_diffusion(directory: Path) -> None:
    """A whole `StableDiffusionPipeline` folder, a few hundred KB: latents of 4 channels, text width 32."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from momalisa.miniature import models

    torch.set_num_threads(1)  # tiny models only wait for each other's threads
    torch.manual_seed(0)
    tokenizer = models.build_clip_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **size, **special))
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    models.save_diffusion(directory, vae, unet, text_encoder, tokenizer)


def save_blip(directory: Path) -> None:
    """A whole BLIP folder for pictures of 32x32, wide enough that they get captions of their own."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    from momalisa.miniature import models

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = models.build_blip_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "sep", "pad")}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 64, **size, **special}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **size}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(directory)
