"""Settings of the server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from momalisa.config.section import Positive, Section


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
    max_batch: Positive = 8
    """Pictures generated together by one replica."""
    max_waiting: Positive = 64
    """Requests that may wait in line; the next gets a 429."""
