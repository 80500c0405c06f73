"""Weights & Biases: metrics, pictures and the promoted model. Offline when there is no key; never in the way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from momalisa.config import Settings
from momalisa.redaction import redacted


def mode(settings: Settings) -> str:
    """online, offline or disabled: `auto` is online when WANDB_API_KEY is set."""
    if settings.wandb.mode != "auto":
        return settings.wandb.mode
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


class Tracker:
    """One W&B run; the same run id goes on where a killed run stopped."""

    def __init__(self, settings: Settings, run_id: str, job: str) -> None:
        import wandb

        local = "://" not in settings.root
        directory = Path(settings.root).absolute() if local else Path(tempfile.mkdtemp(prefix="momalisa-wandb-"))
        directory.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=settings.wandb.project,
            id=f"{run_id}-{job}",
            name=run_id,
            job_type=job,
            dir=str(directory),
            mode=mode(settings),  # type: ignore[arg-type]
            resume="allow",
            config=redacted(settings.model_dump(mode="json")),
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
        )

    def log(self, metrics: dict[str, float]) -> None:
        """Metrics by name; `images_seen` among them is the horizontal axis."""
        self._run.log(metrics)

    def pictures(self, images_seen: int, prompts: list[str], pictures: list[Image.Image]) -> None:
        shown = [self._wandb.Image(picture, caption=prompt) for prompt, picture in zip(prompts, pictures, strict=True)]
        self._run.log({"evaluation": shown, "images_seen": images_seen})

    def artifact(self, name: str, directory: Path, metadata: dict[str, Any], alias: str) -> None:
        """Log a folder as a model artifact under an alias."""
        artifact = self._wandb.Artifact(name, type="model", metadata=metadata)
        artifact.add_dir(str(directory))
        self._run.log_artifact(artifact, aliases=[alias, "latest"])

    def finish(self) -> None:
        self._run.finish()
