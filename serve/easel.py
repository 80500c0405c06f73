"""A checkpoint that can be painted with: its engine, and what is made of the engine's pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

from momalisa.engine import Engine, GenerationError, Request, to_parameters
from serve import png
from serve.work import Commission

if TYPE_CHECKING:
    from serve.studio import Seat

PictureCheck = Callable[[Image.Image], str | None]


class Easel:
    """`seats`: who is being painted, by the engine's numbers; the studio keeps them."""

    def __init__(self, engine: Engine, checkpoint: str, check: PictureCheck | None = None) -> None:
        self.engine, self.checkpoint, self._check = engine, checkpoint, check
        self.seats: dict[int, Seat] = {}
        self.pending_row_steps = 0

    def count(self) -> None:
        """Note how much work is left, for threads that may not ask the engine."""
        self.pending_row_steps = self.engine.pending_row_steps

    def submit(self, commission: Commission, index: int) -> int:
        """Raises ValueError for a request that cannot be."""
        return self.engine.submit(request_of(commission, index))

    def finish(self, commission: Commission, index: int, picture: Image.Image) -> tuple[bytes | None, str]:
        """A PNG that says how it was made, or None and why it is withheld. Raises GenerationError for one flat colour."""
        if all(low == high for low, high in extrema(picture)):
            raise GenerationError("the picture is one flat colour: the weights are damaged, or try precision fp32")
        if self._check is not None and (reason := self._check(picture)):
            return None, reason
        fields = to_parameters(request_of(commission, index)) | {"checkpoint": self.checkpoint}
        return png.encode(picture, fields), ""

    def preview(self, picture: Image.Image) -> bytes:
        return png.encode(picture, {})


def extrema(picture: Image.Image) -> list[tuple[int, int]]:
    """Lowest and highest value of each channel."""
    found: Any = picture.convert("RGB").getextrema()
    return list(found)


def request_of(commission: Commission, index: int) -> Request:
    """The engine's request for one of a commission's seeds."""
    return Request(
        prompt=commission.prompt,
        seed=commission.seeds[index],
        steps=commission.steps,
        guidance_scale=commission.guidance_scale,
        negative_prompt=commission.negative_prompt,
        size_px=commission.size_px,
        sampler=commission.sampler,
        image=_opened(commission.image, "RGB"),
        strength=commission.strength,
        mask=_opened(commission.mask, "L"),
        previews=commission.previews,
        reproducible=commission.reproducible,
        adapter=commission.adapter,
    )


def _opened(data: bytes | None, mode: str) -> Image.Image | None:
    return None if data is None else Image.open(io.BytesIO(data)).convert(mode)
