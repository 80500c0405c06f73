"""The generator: the promoted checkpoint on one accelerator (or a few CPU cores), and the line in front of it."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from momalisa import checkpoint
from momalisa.config import Settings
from momalisa.engine import Engine, Request
from momalisa.storage import Store
from serve.batcher import Batcher
from serve.work import Commission, Outcome, Painted

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Generator:
    """Exists only when it can paint: weights verified against their manifest, one picture made to warm up."""

    def __init__(self, settings: Settings, path: str) -> None:
        """`path` is a checkpoint's, below the root. Raises NoCheckpoint, or ValueError for a file that was changed."""
        started = time.monotonic()
        store = Store(settings.root)
        published = checkpoint.read(store, path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = PRECISIONS[settings.serve.precision]
        unet = checkpoint.load_unet(store, published, dtype if device == "cuda" else torch.float32)
        self._id = published.id
        self._max_batch = settings.serve.max_batch
        self._engine = Engine.load(published.diffusion, unet, device, dtype)
        self._engine.generate([Request("", steps=1, size_px=settings.serve.size_px)])
        self._batcher = Batcher(self._paint, settings.serve.max_batch, settings.serve.max_waiting)
        logger.info("%s is ready on %s after %.1f s", self._id, device, time.monotonic() - started)

    async def paint(self, commission: Commission) -> Outcome:
        """Wait in line, then paint. Does not raise."""
        return await self._batcher.submit(commission)

    async def checkpoint(self) -> str:
        """The id of what is served; answers while painting too."""
        return self._id

    def close(self) -> None:
        """End the painting thread."""
        self._batcher.close()

    def _paint(self, commissions: Sequence[Commission]) -> list[Outcome]:
        """In the painting thread. Raises what the engine raises."""
        requests = [request for commission in commissions for request in requests_of(commission)]
        pngs: list[bytes] = []
        for start in range(0, len(requests), self._max_batch):
            part = requests[start : start + self._max_batch]
            pictures = self._engine.generate(part)
            pngs += [to_png(picture, request, self._id) for picture, request in zip(pictures, part, strict=True)]
        remaining = iter(pngs)
        return [Painted(tuple(next(remaining) for _ in commission.seeds), self._id) for commission in commissions]


def requests_of(commission: Commission) -> list[Request]:
    """One request a seed."""
    return [
        Request(
            prompt=commission.prompt,
            seed=seed,
            steps=commission.steps,
            guidance_scale=commission.guidance_scale,
            negative_prompt=commission.negative_prompt,
            size_px=commission.size_px,
        )
        for seed in commission.seeds
    ]


def to_png(picture: Image.Image, request: Request, checkpoint_id: str) -> bytes:
    """A PNG file that says how it was made, in text chunks."""
    fields: dict[str, Any] = {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "checkpoint": checkpoint_id,
    }
    if request.negative_prompt:
        fields["negative_prompt"] = request.negative_prompt
    info = PngImagePlugin.PngInfo()
    for name, value in fields.items():
        info.add_itxt(name, str(value))
    sink = io.BytesIO()
    picture.save(sink, "PNG", pnginfo=info)
    return sink.getvalue()
