"""A checkpoint as a folder that plain diffusers loads: the fine-tuned UNet among the base's other parts, or a LoRA file."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from momalisa.checkpoint import BEST, Checkpoint, load_text_encoder, load_unet
from momalisa.checkpoint.card import card
from momalisa.diffusion import ZERO_TERMINAL_SNR
from momalisa.pretrained import pretrained
from momalisa.storage import Store

MANIFEST = "momalisa.json"


def export(store: Store, checkpoint: Checkpoint, target: Path, fuse: bool = False) -> Path:
    """Write a new folder: a whole pipeline for `StableDiffusionPipeline.from_pretrained`, on the noise schedule of its training;
    for adapters, unless `fuse`, the file that `load_lora_weights` takes. Beside them the model card and the manifest. Hashes
    are checked on the way.

    The folder appears when it is complete. Raises ValueError where it is there already, or a file is not what it should be.
    """
    if target.exists():
        raise ValueError(f"{target} is there already: name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        if checkpoint.lora and not fuse:
            store.download(f"{checkpoint.path}/weights", checkpoint.files, partial)
        else:
            _pipeline(store, checkpoint).save_pretrained(partial, safe_serialization=True)
        (partial / MANIFEST).write_text(json.dumps(asdict(checkpoint), sort_keys=True, indent=1) + "\n")
        (partial / "README.md").write_text(card(asdict(checkpoint), scores(store, checkpoint)))
        partial.chmod(0o755)  # mkdtemp's is its owner's alone
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def scores(store: Store, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What promotion measured, where this is the promoted checkpoint."""
    promoted = store.read_pointer(BEST).value
    return promoted.get("scores") if promoted and promoted["checkpoint"] == checkpoint.path else None


def _pipeline(store: Store, checkpoint: Checkpoint) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    base = checkpoint.diffusion
    parts: dict[str, Any] = {
        "unet": load_unet(store, checkpoint),
        "text_encoder": load_text_encoder(store, checkpoint).model,
    }
    options = {"revision": base.revision, "variant": base.variant}
    given = parts | {key: value for key, value in options.items() if value is not None}
    pipeline = pretrained(StableDiffusionPipeline, base.model, **given).to(torch.float32)  # all alike, whatever the base's are
    if checkpoint.zero_terminal_snr:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, **ZERO_TERMINAL_SNR)
    return pipeline
