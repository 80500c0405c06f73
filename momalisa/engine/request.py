"""What may be asked of the engine, and how a picture's file says what was asked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image

Sampler = Literal["ddim", "euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)


@dataclass(frozen=True)
class Request:
    """One picture to make. The same request gives the same picture."""

    prompt: str
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 7.5  # 1: no guidance, half the work; the negative prompt then means nothing
    negative_prompt: str = ""
    size_px: int = 512  # a square of this side
    sampler: Sampler = "dpmpp_2m"
    image: Image.Image | None = None  # image-to-image: RGB, size_px square
    strength: float = 0.8  # of `steps`, the share that is done on top of the image
    mask: Image.Image | None = None  # L, size_px square: of the image, what is at least half white is painted again
    previews: int = 0  # partial pictures on the way
    reproducible: bool = False  # bit by bit the same whatever else is in the batch, at the price of its own batch
    adapter: str | None = None  # a LoRA's name
    guidance_interval: tuple[float, float] = (0.0, math.inf)  # noise levels (sigma) at which guidance works

    @property
    def start(self) -> int:
        """Sampler steps that the image takes the place of."""
        return 0 if self.image is None else self.steps - steps_on_image(self.steps, self.strength)

    def check(self, factor: int) -> None:
        """Raises ValueError for a request that cannot be; `factor` is pixels to a latent place."""
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; 20 is a good number")
        if self.size_px < factor or self.size_px % factor:
            nearest = max(1, round(self.size_px / factor)) * factor
            raise ValueError(f"size_px={self.size_px} is not a multiple of {factor}; try {nearest}")
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale={self.guidance_scale} must be at least 1, which is no guidance; try 7.5")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must be between 0 and 2**64 - 1")
        low, high = self.guidance_interval
        if not 0 <= low <= high:
            raise ValueError(f"guidance_interval={self.guidance_interval} must be two noise levels, the lower one first")
        if self.previews < 0:
            raise ValueError(f"previews={self.previews} must be 0 or more")
        self._check_image()

    def _check_image(self) -> None:
        square = (self.size_px, self.size_px)
        if self.mask is not None and self.image is None:
            raise ValueError("a mask without an image: say which picture it belongs to")
        for name, picture, mode in (("image", self.image, "RGB"), ("mask", self.mask, "L")):
            if picture is not None and (picture.size != square or picture.mode != mode):
                raise ValueError(
                    f"the {name} is {picture.width}x{picture.height} {picture.mode}; "
                    f"it must be {self.size_px}x{self.size_px} {mode}, as size_px says"
                )
        if self.image is not None and not (0 <= self.strength <= 1 and self.start < self.steps):
            raise ValueError(
                f"strength={self.strength} of {self.steps} steps must be one step at least and all at most; "
                f"try {1 / self.steps:.2g} to 1"
            )


def steps_on_image(steps: int, strength: float) -> int:
    """Of so many sampler steps, those that are done on top of an image: diffusers' rounding."""
    return min(int(steps * strength), steps)


def to_parameters(request: Request) -> dict[str, str]:
    """What a picture's file says about how it was made; pictures that went in are named by a hash of their pixels."""
    fields = {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "steps": str(request.steps),
        "guidance_scale": repr(float(request.guidance_scale)),
        "size_px": str(request.size_px),
        "sampler": request.sampler,
    }
    if request.negative_prompt:
        fields["negative_prompt"] = request.negative_prompt
    if request.guidance_interval != (0.0, math.inf):
        fields["guidance_interval"] = " ".join(repr(float(level)) for level in request.guidance_interval)
    if request.image is not None:
        fields |= {"image": pixel_hash(request.image), "strength": repr(float(request.strength))}
    if request.mask is not None:
        fields["mask"] = pixel_hash(request.mask)
    if request.reproducible:
        fields["reproducible"] = "true"
    if request.adapter is not None:
        fields["adapter"] = request.adapter
    return fields


def from_parameters(fields: Mapping[str, str], image: Image.Image | None = None, mask: Image.Image | None = None) -> Request:
    """The request that `to_parameters` described; fields of other names are passed over.

    Raises ValueError where a field is missing or wrong, or where `image` or `mask` are not the ones that went in.
    """
    for name, picture in (("image", image), ("mask", mask)):
        expected, given = fields.get(name), None if picture is None else pixel_hash(picture)
        if expected != given:
            raise ValueError(f"the picture was made with {name} {expected or 'none'}, and {given or 'none'} was given")
    try:
        low, high = (float(level) for level in fields.get("guidance_interval", "0 inf").split())
        return Request(
            prompt=fields["prompt"],
            seed=int(fields["seed"]),
            steps=int(fields["steps"]),
            guidance_scale=float(fields["guidance_scale"]),
            negative_prompt=fields.get("negative_prompt", ""),
            size_px=int(fields["size_px"]),
            sampler=_sampler(fields["sampler"]),
            image=image,
            strength=float(fields.get("strength", Request.strength)),
            mask=mask,
            reproducible=fields.get("reproducible") == "true",
            adapter=fields.get("adapter"),
            guidance_interval=(low, high),
        )
    except KeyError as error:
        raise ValueError(f"the picture's file does not say its {error.args[0]}: it was not made here") from error


def _sampler(name: str) -> Sampler:
    for sampler in SAMPLERS:
        if sampler == name:
            return sampler
    raise ValueError(f"sampler={name!r} is not one of {', '.join(SAMPLERS)}")


def pixel_hash(picture: Image.Image) -> str:
    """SHA-256 of a picture's mode, size and pixels."""
    return hashlib.sha256(f"{picture.mode} {picture.width}x{picture.height} ".encode() + picture.tobytes()).hexdigest()
