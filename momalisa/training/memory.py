"""How much accelerator memory a configuration takes at its peak, computed without an accelerator.

    python -m momalisa.training.memory --config configs/sd14-24gb.yaml

Parameters are counted on the meta device. Activations are what autograd keeps of one forward pass, counted there too, in
the types that CUDA's autocast gives them: matrix products and convolutions in 16 bits, normalisation in 32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from momalisa.config import Diffusion, Settings, command_line
from momalisa.training.model import trainable
from momalisa.training.profile import STORED

GIB = 2**30
OVERHEAD_GIB = 1.5  # CUDA's context, workspaces of cuDNN and cuBLAS, fragments
UNITS = ("ResnetBlock2D", "BasicTransformerBlock")  # what diffusers computes again with gradient checkpointing
PASSING = 24  # fp32 values for each latent and channel of the first level: the feed-forward's and what skips to the other side
TEXT_ENCODER_PARAMETERS = 123_060_480  # CLIP ViT-L/14
VAE_PARAMETERS = 83_653_863
# Stable Diffusion 1.x's UNet, as published: https://huggingface.co/CompVis/stable-diffusion-v1-4
SD_1_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


@dataclass(frozen=True)
class Memory:
    """GiB by what takes it. A step's peak has gradients and activations; the evaluation pictures and what an early stop measures
    come between steps."""

    weights: float
    autocast: float  # 16-bit copies of the weights
    gradients: float
    optimizer: float
    average: float
    prior: float  # the frozen copy
    text_encoder: float
    activations: float  # of one pass
    evaluation: float  # the weights put aside, a second text encoder and the VAE, decoding
    early_stop: float  # a second UNet and text encoder, a pass of promote.batch without gradients
    overhead: float = OVERHEAD_GIB

    @property
    def peak(self) -> float:
        always = self.weights + self.optimizer + self.average + self.prior + self.text_encoder + self.overhead
        return always + max(self.autocast + self.gradients + self.activations, self.evaluation, self.early_stop)


def estimate(settings: Settings) -> Memory:
    """The peak of one worker. Raises ValueError where the base's configuration cannot be had."""
    train, config = settings.train, unet_config(settings.diffusion)
    with torch.device("meta"):
        unet = build(config)
        every = sum(value.numel() for value in unet.parameters())
        taught = sum(
            value.numel() for value in trainable(unet, train.model_copy(update={"gradient_checkpointing": False})).values()
        )
    half = train.precision != "fp32"
    size, side = min(train.micro_batch or train.share, train.share), settings.encode.resolution_px // 8
    doubled = 2 if train.prior_weight else 1
    kept = activations(unet, (size * doubled, int(config["in_channels"]), side, side), half, train.gradient_checkpointing)
    pictures = min(len(train.evaluation_prompts), 8)
    decoding = 4 * pictures * 256 * settings.encode.resolution_px**2 * 4  # its widest layers, in fp32
    shown = 4 * (taught + TEXT_ENCODER_PARAMETERS + VAE_PARAMETERS) + decoding if pictures else 0
    passing = settings.promote.batch * PASSING * config["block_out_channels"][0] * side**2 * 4
    measured = 4 * (every + TEXT_ENCODER_PARAMETERS) + passing if train.early_stop_patience else 0
    return Memory(
        weights=4 * every / GIB,
        autocast=2 * every / GIB if half else 0,
        gradients=4 * taught / GIB,
        optimizer=(2 if train.optimizer == "adamw8bit" else 8) * taught / GIB,
        average=0 if train.ema_offload else 4 * taught * (1 + len(STORED) * train.power_ema) / GIB,
        prior=(2 if half else 4) * every / GIB if train.prior_weight and train.lora_rank is None else 0,
        text_encoder=4 * TEXT_ENCODER_PARAMETERS / GIB,
        activations=kept / GIB,
        evaluation=shown / GIB,
        early_stop=measured / GIB,
    )


def unet_config(diffusion: Diffusion) -> dict[str, Any]:
    """The base's own; Stable Diffusion 1.x's is known without asking."""
    if diffusion.model.rsplit("/", 1)[-1].startswith("stable-diffusion-v1-"):
        return SD_1_UNET
    from diffusers import UNet2DConditionModel

    from momalisa.weights import locate

    found = UNet2DConditionModel.load_config(locate(diffusion.model), subfolder="unet", revision=diffusion.revision)
    return dict(found)


def build(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config).train()


class _Autocast(TorchFunctionMode):
    """CUDA's autocast to bfloat16, for tensors of the meta device, which the real one passes by."""

    lower = ("linear", "conv2d", "scaled_dot_product_attention", "baddbmm", "bmm", "matmul")
    raised = ("group_norm", "layer_norm", "softmax")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to = torch.bfloat16 if name in self.lower else torch.float32 if name in self.raised else None

        def cast(value: Any) -> Any:
            return value.to(to) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        if to is None:
            return func(*args, **(kwargs or {}))
        return func(*map(cast, args), **{key: cast(value) for key, value in (kwargs or {}).items()})


def activations(unet: Any, shape: tuple[int, int, int, int], half: bool, checkpointing: bool) -> int:
    """Bytes that a training step's forward pass over latents of `shape` [B, C, H, W] keeps for the backward pass.

    With `checkpointing`: what is kept between the units, each unit's input, and all of the largest unit.
    """
    own = {value.untyped_storage()._cdata for value in unet.parameters()}
    kept: dict[str, dict[int, torch.UntypedStorage]] = {"": {}}  # by unit; storages stay alive, so addresses are not used twice
    inside, inputs = [""], [0]

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        known = any(storage._cdata in found for found in kept.values())
        # a parameter cast to 16 bits is counted with the weights: it is what has no batch
        if storage._cdata not in own and not known and value.dim() and value.shape[0] == shape[0]:
            kept[inside[-1]][storage._cdata] = storage
        elif storage._cdata not in own and not known and value.dim() == 3 and value.shape[0] % shape[0] == 0:
            kept[inside[-1]][storage._cdata] = storage  # heads folded into the batch
        return value

    def enter(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            kept[name] = {}
            inside.append(name)
            inputs[0] += sum(value.untyped_storage().nbytes() for value in args if isinstance(value, torch.Tensor))

        return hook

    def leave(module: Any, args: Any, result: Any) -> None:
        inside.pop()

    units = [(name, module) for name, module in unet.named_modules() if type(module).__name__ in UNITS]
    handles = [module.register_forward_pre_hook(enter(name)) for name, module in units]
    handles += [module.register_forward_hook(leave) for _, module in units]
    width = unet.config.cross_attention_dim
    device = next(unet.parameters()).device
    noisy, text = torch.empty(shape, device=device), torch.empty(shape[0], 77, width, device=device)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            if half:
                with _Autocast():
                    unet(noisy, torch.zeros(shape[0], dtype=torch.int64, device=device), text)
            else:
                unet(noisy, torch.zeros(shape[0], dtype=torch.int64, device=device), text)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {name: sum(storage.nbytes() for storage in found.values()) for name, found in kept.items()}
    if not checkpointing:
        return sum(sizes.values())
    return sizes.pop("") + inputs[0] + max(sizes.values(), default=0)


def table(settings: Settings) -> str:
    """What `python -m momalisa.training.memory` prints."""
    found = estimate(settings)
    lines = [f"{field.name:14} {getattr(found, field.name):6.2f} GiB" for field in dataclasses.fields(found)]
    exchanged = f"{'exchanged':14} {gradient_bytes(settings) / 1e6:6.1f} MB of gradients a step, where there are several workers"
    kept = (
        f"{'checkpoint':14} {checkpoint_bytes(settings) / GIB:6.2f} GiB of the machine's memory, worker 0's, kept for the run; "
        "20% more beside a GPU"
    )
    return "\n".join([*lines, f"{'peak':14} {found.peak:6.2f} GiB", exchanged, kept])


def gradient_bytes(settings: Settings) -> int:
    """What each worker sends and receives of gradients in a step, before the all-reduce's own factor 2 (n - 1) / n."""
    return _taught(settings) * (2 if settings.train.gradient_compression == "bf16" else 4)


def checkpoint_bytes(settings: Settings) -> int:
    """The one copy that is written beside training: weights, averages and the optimizer's moments of what is trained."""
    train = settings.train
    averages = 1 + len(STORED) * train.power_ema
    return _taught(settings) * (4 + 4 * averages + (2 if train.optimizer == "adamw8bit" else 8))


def _taught(settings: Settings) -> int:
    """How many numbers of the UNet are trained."""
    with torch.device("meta"):
        taught = trainable(build(unet_config(settings.diffusion)), settings.train)
    return sum(value.numel() for value in taught.values())


def main() -> None:
    print(table(command_line(__doc__, "momalisa.training.memory")))


if __name__ == "__main__":
    main()
