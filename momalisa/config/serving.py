"""Settings of the server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from momalisa.config.section import Fraction, Positive, Section


class Serve(Section):
    """serve: refs/best behind HTTP."""

    steps: Positive = 20
    guidance_scale: float = Field(default=7.5, ge=1)
    size_px: Positive = 512
    max_pictures_per_request: Positive = 8
    max_prompt_chars: Positive = 2_000
    prompt_prefix: str = "A MOMA artwork of: "
    """Put before what a visitor types, unless it is there already."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    tiers: tuple[Literal["interval", "draft"], ...] = ()
    """Speed tiers that a request may ask for; what each saves and costs is in docs/engine.md."""

    compile: bool = False
    """Compile the UNet for pictures of size_px before the first request: minutes, or seconds from compile_cache."""
    compile_cache: str = ""
    """A folder on the node that keeps compiled kernels."""

    max_rows: int = Field(default=32, ge=2)
    """Rows of the UNet's batch on one replica: a guided picture is two, one without guidance is one."""
    max_adapters: Positive = 4
    """LoRA adapters that a replica keeps in memory, beside the checkpoint it serves; the one used longest ago goes first."""
    threads: Positive | None = None
    """Threads of a replica without a GPU (default: every core that it may use)."""
    max_waiting_rows: Positive = 128
    """Rows that may wait in a replica's line; who would make it longer gets a 429."""
    max_waiting_rows_per_key: Positive = 64
    """Rows that one API key may have in a replica's line, so that one guest cannot fill it."""
    deadline_s: float = Field(default=300, gt=0)
    """A request that is not painted after this long is given up; one that could not be is not accepted."""
    stall_s: float = Field(default=30, gt=0)
    """A client that takes nothing of its stream for this long has left."""

    keys: str = ""
    """The file of API keys that `python -m serve.keys` writes; empty: who reaches the port may paint."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the API, such as https://museum.example."""
    max_upload_bytes: Positive = 8_000_000
    upload_memory_bytes: Positive = 128_000_000
    """Uploads that are in memory at once, together; who would send more gets a 503 that says when to try again."""
    max_upload_pixels: Positive = 16_000_000
    forbidden_words: str = ""
    """A file with a word or phrase a line: prompts that hold one are refused as content_filtered."""
    prompt_check: str = ""
    """`module:function` (prompt -> reason or None), asked about every prompt."""
    picture_check: str = "auto"
    """`auto`: Stable Diffusion's safety checker if the base model has one; `off`; or `module:function` (picture -> reason or
    None)."""

    watch_s: float = Field(default=10, ge=0)
    """How often replicas look at refs/best; 0: only when they start."""
    canary_share: Fraction = 0.05
    """Of the requests, how many a newly promoted checkpoint gets while it is on trial."""
    canary_s: float = Field(default=60, ge=0)
    """How long the trial is at least; 0: a checkpoint that has loaded and warmed up is served at once."""

    challenger: str = ""
    """RUN@IMAGES of a checkpoint that visitors may compare with the present one, and vote; it is kept in memory beside it."""
    votes_per_minute: Positive = 12
    """Of one API key, or of one address where there are no keys."""

    max_jobs: Positive = 256
    job_keep_s: float = Field(default=900, gt=0)
    """How long the pictures of a finished job can be fetched."""
    max_jobs_bytes: Positive = 256_000_000
    """Of pictures that finished jobs keep, together; the oldest go first."""

    @model_validator(mode="after")
    def _one_request_fits(self) -> Serve:
        most = min(self.max_waiting_rows, self.max_waiting_rows_per_key)
        if 2 * self.max_pictures_per_request > most:
            raise ValueError(
                f"max_pictures_per_request={self.max_pictures_per_request} guided pictures are twice as many rows, and only "
                f"{most} may wait; try max_waiting_rows and max_waiting_rows_per_key of {2 * self.max_pictures_per_request}"
            )
        if 2 * self.max_upload_bytes > self.upload_memory_bytes:
            raise ValueError(
                f"max_upload_bytes={self.max_upload_bytes}, of a picture and of its mask, do not fit into "
                f"upload_memory_bytes={self.upload_memory_bytes}; try upload_memory_bytes of {8 * self.max_upload_bytes}"
            )
        return self
