"""A picture's own file -> what to ask a server for to get the very same picture again.

    python -m serve.again picture.png
    python -m serve.again edited.png --image photograph.jpg --mask mask.png

prints the fields of that request as JSON. Of an edit, the file holds the SHA-256 of what went in: of the pixels of picture and
mask, as the squares that the engine was given. Others are refused here, before anything is painted over them.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from momalisa.config import Serve
from momalisa.engine import Request, from_parameters
from momalisa.engine.tiers import TIERS, steps_at
from serve import png, uploads
from serve.errors import ApiError
from serve.wire import MAX_STEPS

PICTURES = {"image": "RGB", "mask": "L"}  # fields of a file, and their modes


def fields(made: bytes, image: bytes | None = None, mask: bytes | None = None) -> dict[str, Any]:
    """Of the request that painted a file. An edit's go into a form, with `image` and `mask` as they were sent the first time.

    Raises ValueError for a file that was not made here, and for pictures that are not those that went in; what Pillow raises
    for a file that is no PNG.
    """
    said = png.read(made)
    request = from_parameters(said, **_squares(said, image, mask))
    asked = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or None,
        "seed": request.seed,
        "steps": _steps(request, said.get("tier", "full")),
        "guidance_scale": request.guidance_scale,
        "size": f"{request.size_px}x{request.size_px}",
        "sampler": request.sampler,
        "strength": None if request.image is None else request.strength,
        "reproducible": request.reproducible or None,
        "adapter": request.adapter,
        "tier": said.get("tier"),
    }
    return {name: value for name, value in asked.items() if value is not None}


def _squares(said: Mapping[str, str], image: bytes | None, mask: bytes | None) -> dict[str, Image.Image]:
    """What was sent, as the engine gets it."""
    if image is None:
        return {}
    size_px = from_parameters({name: value for name, value in said.items() if name not in PICTURES}).size_px
    try:
        squares = uploads.prepare(uploads.Form({}, image, mask), size_px, Serve())
    except ApiError as error:
        raise ValueError(str(error)) from error
    opened = zip(PICTURES.items(), squares, strict=True)
    return {name: Image.open(io.BytesIO(square)).convert(mode) for (name, mode), square in opened if square is not None}


def _steps(request: Request, tier: str) -> int:
    """The steps that were asked for, of which the tier did fewer."""
    for steps in range(1, MAX_STEPS + 1):
        if tier in TIERS and steps_at(steps, tier) == request.steps:
            return steps
    raise ValueError(f"no request for tier={tier!r} does {request.steps} steps: the file was not made here")


def main(arguments: list[str] | None = None) -> int:
    """2 where there is no such request."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.again", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a PNG that a server painted")
    parser.add_argument("--image", type=Path, help="of an edit: the picture that was sent")
    parser.add_argument("--mask", type=Path, help="of an edit: the mask that was sent, if one was")
    options = parser.parse_args(arguments)
    try:
        sent = [path and path.read_bytes() for path in (options.image, options.mask)]
        print(json.dumps(fields(options.file.read_bytes(), *sent)))
    except (OSError, SyntaxError, ValueError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
