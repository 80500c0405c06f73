"""Speed for quality, where it is asked for: the same request with fewer guided steps, or fewer steps.

Guidance at high noise narrows what a model draws and at low noise changes little (Kynkäänniemi et al. 2024, "Applying
guidance in a limited interval improves sample and distribution quality"): outside the interval a picture is one row, not
two. What each tier costs is measured by `bench/tiers.py`, and written down in docs/engine.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from momalisa.engine.request import Request

Tier = Literal["full", "interval", "draft"]


@dataclass(frozen=True)
class Saving:
    """The share of the steps that is done, and the noise levels (sigma) at which they are guided."""

    steps: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)


TIERS: dict[Tier, Saving] = {
    "full": Saving(),
    "interval": Saving(guidance_interval=(0.28, 5.42)),  # the paper's for Stable Diffusion XL
    "draft": Saving(steps=0.6, guidance_interval=(0.28, 5.42)),
}


def steps_at(steps: int, tier: Tier) -> int:
    """How many of the steps that were asked for the tier does."""
    return max(1, round(steps * TIERS[tier].steps))


def at_tier(request: Request, tier: Tier) -> Request:
    """The request as that tier draws it."""
    return replace(request, steps=steps_at(request.steps, tier), guidance_interval=TIERS[tier].guidance_interval)
