"""Published weights: a folder of safetensors, a manifest with every file's hash written last, and `refs/best`.

    <root>/checkpoints/<run>/<images seen>/weights/   a UNet folder as diffusers saves it, or a LoRA file
    <root>/checkpoints/<run>/<images seen>/state/     what training resumes from
    <root>/checkpoints/<run>/<images seen>/README.md  the model card
    <root>/checkpoints/<run>/<images seen>/manifest.json
    <root>/refs/best                                   which checkpoint hangs in the hall

A checkpoint without a manifest does not exist; one whose files are not what its manifest says is never loaded. The parts
that fine-tuning leaves alone stay with the base, which the manifest names; `python -m momalisa.checkpoint export` puts
them together for plain diffusers.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from safetensors.torch import save_file

from momalisa.checkpoint.card import card, licence
from momalisa.config import Diffusion
from momalisa.latents import TextEncoder
from momalisa.storage import StorageError, Store
from momalisa.weights import locate

BEST = "refs/best"
FORMAT = "momalisa/1"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
TEXT_PREFIX = "text_encoder."  # of names in it: the text encoder's adapters


class NoCheckpoint(ValueError):
    """There is nothing whole to promote or to serve; the message says what was found, or which job makes it."""


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
    training: dict[str, Any] = field(default_factory=dict)  # dataset version, settings, losses
    metrics: dict[str, float] = field(default_factory=dict)  # the last training loss
    licence: str = ""  # of the base: what whoever passes the weights on is bound by
    format: str = FORMAT

    @property
    def id(self) -> str:
        return f"{self.run}-{self.images_seen}"

    @property
    def name(self) -> str:
        """`RUN@IMAGES`: what commands take."""
        return f"{self.run}@{self.images_seen}"

    @property
    def diffusion(self) -> Diffusion:
        return Diffusion(**self.base)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether it was trained on a schedule that ends in noise alone, and so must be sampled on that one."""
        return bool((self.training.get("settings") or {}).get("zero_terminal_snr"))


def write(store: Store, checkpoint: Checkpoint, weights: Path, state: Path | None = None) -> Checkpoint:
    """Upload a folder of weights, and of trainer state, the card, then the manifest; returns the checkpoint with its hashes."""
    losses = checkpoint.training.get("losses") or []
    complete = replace(
        checkpoint,
        files=store.upload(weights, f"{checkpoint.path}/weights"),
        state=store.upload(state, f"{checkpoint.path}/state") if state else {},
        metrics={"training_loss": float(losses[-1][1])} if losses else {},
        licence=licence(checkpoint.base["model"]),
    )
    store.write_bytes(f"{checkpoint.path}/README.md", card(asdict(complete)).encode())
    store.write_json(f"{checkpoint.path}/manifest.json", asdict(complete))
    return complete


class Average(BaseModel, extra="allow", strict=True):
    sigma_rel: float


class Training(BaseModel, extra="allow", strict=True):
    """Of `Checkpoint.training`, what this program reads again."""

    losses: list[Annotated[list[float], Field(min_length=2, max_length=2)]] = []  # (images seen, training loss)
    settings: dict[str, Any] | None = None
    average: Average | None = None  # of one that was made after training
    dataset: str | None = None
    stopped: bool = False


_manifest = TypeAdapter(Checkpoint)


def read(store: Store, path: str) -> Checkpoint:
    """The checkpoint at a path. Raises NoCheckpoint where there is no manifest, or one that is not ours; StorageError where the
    storage does not say."""
    try:
        value = store.read_json(f"{path}/manifest.json")
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise NoCheckpoint(f"{store.url(path)} holds no complete checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise NoCheckpoint(f"{store.url(path)}/manifest.json is damaged: {error}") from error
    if (wrong := _wrong(value, path)) is not None:
        raise NoCheckpoint(f"{store.url(path)} is not a checkpoint of this program: {wrong}")
    return _manifest.validate_python(value)


def _wrong(value: Any, path: str) -> str | None:
    """Why a manifest is none of ours, or None."""
    if not isinstance(value, dict) or value.get("format", FORMAT) != FORMAT:
        return f"its manifest's format is not {FORMAT!r}"
    known = {entry.name for entry in fields(Checkpoint)}
    needed = {"path", "run", "images_seen", "base", "files"}
    if unknown := sorted((set(value) - known) | (needed - set(value))):
        return f"its manifest has other fields ({', '.join(unknown)})"
    try:
        checkpoint = _manifest.validate_python(value)
        Diffusion.model_validate(checkpoint.base)
        Training.model_validate(checkpoint.training)
    except ValidationError as error:
        first = error.errors()[0]
        return f"its manifest's {'.'.join(str(part) for part in first['loc'])} is something else ({first['msg']})"
    if "model" not in checkpoint.base:
        return "its manifest's base names no model"
    if checkpoint.path != path:
        return f"its manifest belongs to {checkpoint.path}"
    if outside := [name for name in (*checkpoint.files, *checkpoint.state) if not _inside(name)]:
        return f"its manifest names {outside[0]!r}"
    return None if checkpoint.files else "its manifest names no weights"


def _inside(name: str) -> bool:
    """Whether a file's name stays below the folder that it is named in."""
    path = PurePosixPath(name)
    return path.as_posix() == name != "." and not path.is_absolute() and ".." not in path.parts


def read_all(store: Store, run: str) -> list[Checkpoint]:
    """Every complete checkpoint of a run, in order of images seen. One that is damaged or foreign is passed over and said."""
    found = []
    for path in store.list(f"checkpoints/{run}"):
        if path.endswith("/manifest.json"):
            try:
                found.append(read(store, path.removesuffix("/manifest.json")))
            except NoCheckpoint as error:
                print(f"checkpoints: {error}; passed over", flush=True)
    return sorted(found, key=lambda checkpoint: checkpoint.images_seen)


def find(store: Store, name: str) -> Checkpoint:
    """The checkpoint called `RUN@IMAGES`. Raises NoCheckpoint naming those that there are."""
    run, _, images = name.rpartition("@")
    found = read_all(store, run) if run and images.isdigit() else []
    for checkpoint in found:
        if checkpoint.images_seen == int(images):
            return checkpoint
    known = ", ".join(checkpoint.name for checkpoint in found) or "none of that run; a name is RUN@IMAGES"
    raise NoCheckpoint(f"{store.root} holds no checkpoint {name!r}: there are {known}")


def verify(store: Store, checkpoint: Checkpoint) -> None:
    """Raises ValueError naming the weights' file that is gone, or is not what the manifest says."""
    for name, expected in checkpoint.files.items():
        path = f"{checkpoint.path}/weights/{name}"
        try:
            actual = hashlib.sha256(store.read_bytes(path)).hexdigest()
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        if actual != expected:
            raise ValueError(f"{store.url(path)} has sha256 {actual[:16]}..., its manifest says {expected[:16]}...")


def read_best(store: Store) -> Checkpoint:
    """The promoted checkpoint. Raises NoCheckpoint if none was ever promoted."""
    if not store.exists(BEST):
        raise NoCheckpoint(f"{store.url(BEST)} does not exist: run the promote job first")
    return read(store, store.read_json(BEST)["checkpoint"])


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


def load_text_encoder(
    store: Store, checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder that belongs to a checkpoint's UNet: the base's, with the checkpoint's adapters fused if it has some.

    Raises ValueError naming the file that is not what the manifest says.
    """
    if not checkpoint.lora:
        return TextEncoder.load(checkpoint.diffusion, device, dtype)
    with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
        directory = store.download(f"{checkpoint.path}/weights", checkpoint.files, Path(scratch))
        text_encoder = TextEncoder.load(checkpoint.diffusion)
        if add_text_adapters(text_encoder.model, directory):
            _fuse(text_encoder.model)
    torch.nn.Module.to(text_encoder.model, device, dtype)
    return text_encoder


def add_text_adapters(model: Any, directory: Path) -> bool:
    """Put the text encoder's adapters of a LoRA file into a CLIP text model. False: the file has none."""
    state, alphas = StableDiffusionPipeline.lora_state_dict(directory, weight_name=LORA_FILE)
    if not any(name.startswith(TEXT_PREFIX) for name in state):
        return False
    StableDiffusionPipeline.load_lora_into_text_encoder(state, network_alphas=alphas, text_encoder=model)
    model.requires_grad_(False).eval()
    return True


def _fuse(model: Any) -> None:
    """Add adapters to the weights that they belong to, and take them out."""
    from diffusers.utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(model)
    del model.peft_config
    model._hf_peft_config_loaded = False
