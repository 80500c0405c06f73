"""PNG files that say how they were made, and the way back: a picture's own file is enough to paint it again."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from PIL import Image, PngImagePlugin

from serve.work import Commission

WHOLE = ("seed", "steps")
TEXTS = ("prompt", "negative_prompt", "sampler", "size")
REALS = ("guidance_scale", "strength")


def parameters(commission: Commission, index: int, checkpoint: str) -> dict[str, str]:
    """What decides a picture, as text. Of an edit's picture and mask the hashes are told: whoever has them can repeat it."""
    fields = {
        "prompt": commission.prompt,
        "seed": str(commission.seeds[index]),
        "steps": str(commission.steps),
        "guidance_scale": str(commission.guidance_scale),
        "sampler": commission.sampler,
        "size": f"{commission.size_px}x{commission.size_px}",
        "checkpoint": checkpoint,
    }
    if commission.negative_prompt:
        fields["negative_prompt"] = commission.negative_prompt
    if commission.image is not None:
        fields["strength"] = str(commission.strength)
        fields["image_sha256"] = hashlib.sha256(commission.image).hexdigest()
    if commission.mask is not None:
        fields["mask_sha256"] = hashlib.sha256(commission.mask).hexdigest()
    return fields


def encode(picture: Image.Image, fields: dict[str, str]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, value in fields.items():
        info.add_itxt(name, value)
    sink = io.BytesIO()
    picture.save(sink, "PNG", pnginfo=info, compress_level=3)
    return sink.getvalue()


def read(data: bytes) -> dict[str, Any]:
    """A picture of ours -> the request body that paints it again. Raises ValueError for a file that does not say."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        texts = dict(getattr(picture, "text", {}))
    if "prompt" not in texts or "seed" not in texts:
        raise ValueError("this PNG does not say how it was made: it is not one of ours, or another program has rewritten it")
    body: dict[str, Any] = {name: str(texts[name]) for name in TEXTS if name in texts}
    body |= {name: int(texts[name]) for name in WHOLE if name in texts}
    return body | {name: float(texts[name]) for name in REALS if name in texts}
