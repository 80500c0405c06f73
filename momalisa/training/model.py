"""What is trained: the UNet, or adapters on it and on the text encoder, in one module that takes a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import LORA_FILE, TEXT_PREFIX
from momalisa.config import Train
from momalisa.latents import TextEncoder

UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Denoiser(torch.nn.Module):
    """The UNet and, where it is trained too, the text encoder."""

    def __init__(self, unet: Any, text_encoder: TextEncoder, settings: Train) -> None:
        """Adds the adapters that `settings` want, equal on every worker, and freezes what is not trained. A base's own dropout
        is switched off."""
        super().__init__()
        self.unet = unet
        self.text_encoder: Any = text_encoder.model if settings.lora_text_encoder else None
        for module in unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # it would draw from the process's own generator: another model for each worker and resume
        trainable(unet, settings)
        if self.text_encoder is not None:
            self.text_encoder.requires_grad_(False)
            self.text_encoder.add_adapter(adapters(settings, TEXT_TARGETS))

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """x_t [B, C, H, W], t [B] and embeddings [B, L, D], or token ids [B, L] -> the prediction [B, C, H, W]."""
        if text.dim() == 2:
            text = self.text_encoder(input_ids=text).last_hidden_state
        predicted: torch.Tensor = self.unet(noisy, timesteps, text).sample
        return predicted

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What is trained by name: the UNet's own names, and text_encoder.* for the text encoder's."""
        named = ((name.removeprefix("unet."), value) for name, value in self.named_parameters())
        return {name: value for name, value in named if value.requires_grad}

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside, the modules compute what the base does."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer._disable_adapters = True  # its own method would also stop the training of its parameters
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False


class Prior:
    """The frozen base, for prior preservation: adapters switched off, or a copy made before training."""

    def __init__(self, denoiser: Denoiser, settings: Train, dtype: torch.dtype) -> None:
        self.denoiser, self.dtype, self.copy = denoiser, dtype, None
        if settings.lora_rank is None:
            self.copy = copy.deepcopy(denoiser.unet).eval().requires_grad_(False)
            torch.nn.Module.to(self.copy, dtype)

    @torch.no_grad()
    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The base's prediction [B, C, H, W] float32."""
        with torch.autocast(noisy.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            if self.copy is not None:
                found: torch.Tensor = self.copy(noisy, timesteps, text).sample
            else:
                with self.denoiser.without_adapters():
                    found = self.denoiser(noisy, timesteps, text)
        return found.float()


def trainable(unet: Any, settings: Train) -> dict[str, torch.nn.Parameter]:
    """Choose what of a UNet is trained, all weights or new adapters on its attention layers, and return it by name."""
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.requires_grad_(settings.lora_rank is None)
    if settings.lora_rank is not None:
        torch.manual_seed(settings.seed)  # the adapters' initial weights
        unet.add_adapter(adapters(settings, UNET_TARGETS))
    return {name: value for name, value in unet.named_parameters() if value.requires_grad}


def adapters(settings: Train, targets: list[str]) -> Any:
    from peft import LoraConfig

    assert settings.lora_rank is not None
    alpha: Any = settings.lora_alpha or settings.lora_rank  # a float is as good as an int
    return LoraConfig(r=settings.lora_rank, lora_alpha=alpha, target_modules=targets, use_dora=settings.dora)


def publishable(values: dict[str, torch.Tensor], settings: Train) -> dict[str, torch.Tensor]:
    """Trained values as they are published: adapters with their scale (alpha / rank) in the second factor, so that a reader
    who takes alpha for the rank, as all do who are not told, has it right."""
    if settings.lora_rank is None or settings.lora_alpha is None:
        return values
    scale = settings.lora_alpha / settings.lora_rank
    return {name: value * scale if ".lora_B." in name else value for name, value in values.items()}


def save_trained(directory: Path, denoiser: Denoiser, values: dict[str, torch.Tensor]) -> None:
    """Write published values in the files of a checkpoint: the whole UNet, or a LoRA file."""
    lora = any(".lora_A." in name for name in values)
    checkpoints.save_weights(denoiser.unet, directory, of_unet(values), lora=lora)
    save_text_adapters(directory, denoiser.text_encoder, values)


def of_unet(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if not name.startswith(TEXT_PREFIX)}


def save_text_adapters(directory: Path, text_encoder: Any, values: dict[str, torch.Tensor]) -> None:
    """Write the text encoder's adapters, if there are any, into the LoRA file beside the UNet's, as diffusers names them."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    own = {name.removeprefix(TEXT_PREFIX): value for name, value in values.items() if name.startswith(TEXT_PREFIX)}
    if not own:
        return
    named = convert_state_dict_to_diffusers(get_peft_model_state_dict(text_encoder, state_dict=own, save_embedding_layers=False))
    with safe_open(directory / LORA_FILE, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        metadata = file.metadata()
    found |= {TEXT_PREFIX + name: value.contiguous() for name, value in named.items()}
    save_file(found, directory / LORA_FILE, metadata=metadata)
