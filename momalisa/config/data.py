"""Settings of collect, caption and encode: from a source to latents."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from momalisa.config.section import Fraction, Positive, Section

AIC_API = "https://api.artic.edu/api/v1"


class Source(Section):
    """Where the artworks are."""

    kind: Literal["moma", "folder", "aic"] = "moma"
    """`moma`: a collection file in MoMA's CSV schema; `folder`: a folder or gs:// prefix of pictures; `aic`: the public
    domain works of the Art Institute of Chicago, through its API."""
    location: str = "http://127.0.0.1:8930/collection.csv"
    """A URL or path of the collection file; or the folder or gs:// prefix; for `aic` https://api.artic.edu/api/v1."""
    on_view_only: bool = True
    """moma, aic: only works on display now."""
    departments: tuple[str, ...] = ()
    """Only works of these departments, as the source spells them, e.g. '["Drawings & Prints"]'; empty: of all."""
    classifications: tuple[str, ...] = ()
    """Only works of these classifications, e.g. '["Painting"]'; empty: of all."""
    limit: Positive | None = None
    """Stop after so many works."""

    @model_validator(mode="before")
    @classmethod
    def _address_of_the_api(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "aic":
            return {"location": AIC_API, **values}
        return values


class Collect(Section):
    """collect: a source's pictures -> clean pictures in the dataset."""

    source: Source = Source()
    max_side_px: Positive = 1024
    """Pictures are scaled down to this; 512x512 training wants no more."""
    max_pixels: Positive = 120_000_000
    """More in the file's header than this is a decompression bomb."""
    min_side_px: Positive = 8
    """A picture with a shorter side is a placeholder, not a work."""
    max_bytes: Positive = 50_000_000
    matte: str = Field(default="#ffffff", pattern="^#[0-9a-fA-F]{6}$")
    """What is put behind transparent pictures."""
    animated: Literal["first_frame", "reject"] = "first_frame"
    """Animations and files of several pages: take the first picture, or none."""
    duplicates: Literal["drop", "keep"] = "drop"
    """drop: a picture that the dataset has already, or has larger, is passed by from captioning on; its row stays."""
    tasks: Positive = 2
    """Download tasks at a time."""
    per_host: Positive = 4
    """Connections to one host at a time, over all tasks."""
    requests_per_second: float = Field(default=10.0, gt=0)
    """Requests to one host in a second, over all tasks. A longer Crawl-delay in its robots.txt holds instead."""
    obey_robots: bool = True
    """Leave alone what robots.txt or `X-Robots-Tag: noai` forbid. false: only for a site that is your own."""
    timeout_s: float = Field(default=30.0, gt=0)
    attempts: Positive = 4
    allow_private_addresses: bool = False
    """Fetch from loopback and private networks too (the miniature museum is there)."""
    user_agent: str = Field(default="momalisa/0.1 (art collection research; see README)", pattern="^[A-Za-z_-]+")
    """Name, version and a way to reach you. Its first word is the name that robots.txt may address."""
    refresh: bool = False
    """Ask again for the pictures of known usable works; what has changed is replaced. --refresh"""
    retry_failed: bool = False
    """Ask again for the works that were rejected, and for no others. --retry-failed"""
    max_bad_fraction: Fraction = 0.5
    """Fail when more of the works than this were rejected."""
    block_size: Positive = 64
    """Works in one task and one Parquet file."""


class Caption(Section):
    """caption: pictures -> texts, by BLIP, and longer ones by Florence-2."""

    model: str = "Salesforce/blip-image-captioning-base"
    revision: str | None = None
    prefix: str = "A MOMA artwork of: "
    max_new_tokens: Positive = 40
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of both captioners: fp16 on a GPU; bf16 is the fastest on a CPU that has AMX."""
    long_model: str | None = None
    """A second captioner for detailed texts, such as florence-community/Florence-2-base; none by default."""
    long_revision: str | None = None
    long_prompt: Literal["<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"] = "<DETAILED_CAPTION>"
    long_max_new_tokens: Positive = 128
    batch: Positive = 16
    actors: Positive = 1
    cpus_per_actor: float = Field(default=1, gt=0)
    gpus_per_actor: float = Field(default=0, ge=0)
    cpus_per_decoder: float = Field(default=0.5, ge=0)
    """What each task that decodes pictures reserves; nothing where the actors take every CPU that there is."""
    max_bad_fraction: Fraction = 0.05


class Encode(Section):
    """encode: pictures -> latent moments, captions -> token ids."""

    batch: Positive = 16
    actors: Positive = 1
    cpus_per_actor: float = Field(default=1, gt=0)
    gpus_per_actor: float = Field(default=0, ge=0)
    cpus_per_decoder: float = Field(default=0.5, ge=0)
    """What each task that decodes pictures reserves; nothing where the actors take every CPU that there is."""
    caption: Literal["short", "long", "fused"] = "short"
    """Which text of a work is trained on; `long` wants caption.long_model."""
    resolution_px: Positive = 512
    """Square pictures of this size: the short side is scaled to it and the centre kept. With buckets: of about this area."""
    buckets: bool = False
    """Keep each picture's proportions: its size is the nearest of a few with about the square's area (up to 4:1 and 1:4)."""
    bucket_step_px: Positive | None = None
    """Sides of buckets are multiples of this (default: an eighth of resolution_px, at most 64, in multiples of 8)."""
    mirrored: bool = False
    """Encode each picture's mirror image too, which train.flip wants: twice the time, and twice the bytes of moments."""
    max_bad_fraction: Fraction = 0.05

    @property
    def step_px(self) -> int:
        return self.bucket_step_px or max(8, min(64, self.resolution_px // 64 * 8))

    @model_validator(mode="after")
    def _eight(self) -> Encode:
        for name, value in (("resolution_px", self.resolution_px), ("bucket_step_px", self.step_px)):
            if value % 8:
                raise ValueError(f"{name}={value} is not a multiple of 8; try {-(-value // 8) * 8}")
        return self
