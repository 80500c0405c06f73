"""Published weights: a folder of safetensors, a manifest with every file's hash written last, and `refs/best`.

    <root>/checkpoints/<run>/<images seen>/weights/   a UNet folder as diffusers saves it, or a LoRA file
    <root>/checkpoints/<run>/<images seen>/state/     what training resumes from
    <root>/checkpoints/<run>/<images seen>/manifest.json
    <root>/refs/best                                   which checkpoint hangs in the hall

A checkpoint without a manifest does not exist; one whose files are not what its manifest says is never loaded.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from momalisa.config import Diffusion
from momalisa.storage import Store
from momalisa.weights import locate

BEST = "refs/best"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"


class NoCheckpoint(ValueError):
    """There is nothing to promote or to serve yet; the message says which job makes it."""


@dataclass(frozen=True)
class Checkpoint:
    """What a manifest says: where the weights are, which base they belong to, how they came about."""

    path: str  # relative to the store's root
    run: str
    images_seen: int
    base: dict[str, Any]  # model, revision, variant: the rest of the pipeline
    files: dict[str, str]  # name below weights/ -> sha256
    lora: bool = False
    state: dict[str, str] = field(default_factory=dict)  # name below state/ -> sha256: what training resumes from
    training: dict[str, Any] = field(default_factory=dict)  # dataset manifest, settings, loss

    @property
    def id(self) -> str:
        return f"{self.run}-{self.images_seen}"

    @property
    def diffusion(self) -> Diffusion:
        return Diffusion(**self.base)


def write(store: Store, checkpoint: Checkpoint, weights: Path, state: Path | None = None) -> Checkpoint:
    """Upload a folder of weights, and of trainer state, then the manifest; returns the checkpoint with its hashes."""
    files = store.upload(weights, f"{checkpoint.path}/weights")
    saved = store.upload(state, f"{checkpoint.path}/state") if state else {}
    complete = Checkpoint(**{**asdict(checkpoint), "files": files, "state": saved})
    store.write_json(f"{checkpoint.path}/manifest.json", asdict(complete))
    return complete


def read(store: Store, path: str) -> Checkpoint:
    """The checkpoint at a path. Raises NoCheckpoint where there is no manifest."""
    try:
        return Checkpoint(**store.read_json(f"{path}/manifest.json"))
    except FileNotFoundError as error:
        raise NoCheckpoint(f"{store.url(path)} holds no complete checkpoint") from error


def read_all(store: Store, run: str) -> list[Checkpoint]:
    """Every complete checkpoint of a run, in order of images seen."""
    manifests = [path for path in store.list(f"checkpoints/{run}") if path.endswith("/manifest.json")]
    found = [read(store, path.removesuffix("/manifest.json")) for path in manifests]
    return sorted(found, key=lambda checkpoint: checkpoint.images_seen)


def read_best(store: Store) -> Checkpoint:
    """The promoted checkpoint. Raises NoCheckpoint if none was ever promoted."""
    if not store.exists(BEST):
        raise NoCheckpoint(f"{store.url(BEST)} does not exist: run the promote job first")
    return read(store, store.read_json(BEST)["checkpoint"])


def forget_state(store: Store, checkpoint: Checkpoint) -> None:
    """Keep a checkpoint's weights only. The manifest first: what it does not name is nobody's."""
    if not checkpoint.state:
        return
    store.write_json(f"{checkpoint.path}/manifest.json", asdict(replace(checkpoint, state={})))
    for name in checkpoint.state:
        store.delete(f"{checkpoint.path}/state/{name}")


def save_weights(unet: Any, directory: Path, values: dict[str, torch.Tensor] | None = None, lora: bool = False) -> None:
    """Write a UNet, or just its adapters, in the files that plain diffusers loads.

    `values`: parameters by name that are written in place of the UNet's own; all of them, or all adapters' for `lora`.
    """
    if not lora:
        directory.mkdir(parents=True, exist_ok=True)
        unet.save_config(directory)
        own = {name: value.detach().contiguous() for name, value in (values or unet.state_dict()).items()}
        save_file(own, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        return
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    adapters = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, state_dict=values))
    StableDiffusionPipeline.save_lora_weights(directory, unet_lora_layers=adapters, safe_serialization=True)


def load_base_unet(diffusion: Diffusion, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The base model's own UNet."""
    where = locate(diffusion.model)
    return UNet2DConditionModel.from_pretrained(
        where, subfolder="unet", revision=diffusion.revision, variant=diffusion.variant, torch_dtype=dtype, use_safetensors=True
    ).eval()


def load_unet(store: Store, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A checkpoint's UNet, every file verified against its hash; adapters are fused into the base.

    Raises ValueError naming the file that is not what the manifest says.
    """
    with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
        directory = store.download(f"{checkpoint.path}/weights", checkpoint.files, Path(scratch))
        if not checkpoint.lora:
            return UNet2DConditionModel.from_pretrained(directory, torch_dtype=dtype, use_safetensors=True).eval()
        unet = load_base_unet(checkpoint.diffusion, dtype)
        state, alphas = StableDiffusionPipeline.lora_state_dict(directory, weight_name=LORA_FILE, unet_config=unet.config)
        StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
        unet.fuse_lora()
        unet.unload_lora()
        return unet.eval()
