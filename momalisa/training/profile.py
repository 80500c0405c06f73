"""Power-function averages: how long they are, and one made of others (Karras et al. 2024, "Analyzing and Improving the
Training Dynamics of Diffusion Models", section 3 and appendix C). Time is counted in images seen; only its ratios matter.

An average that ends at T weighs the weights at t <= T by its profile p(t) = (gamma + 1) t^gamma / T^(gamma + 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from momalisa.config.training import LONGEST_EMA

STORED = (0.05, 0.10)  # relative lengths of the averages that training keeps, as in the paper


@dataclass(frozen=True, order=True)
class Profile:
    """Which average: where it ends, and its length."""

    images_seen: int
    sigma_rel: float

    @property
    def gamma(self) -> float:
        return exponent(self.sigma_rel)


@lru_cache
def exponent(sigma_rel: float) -> float:
    """The gamma of a relative length, from sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Raises ValueError."""
    if not 0 < sigma_rel <= LONGEST_EMA:
        raise ValueError(f"sigma_rel={sigma_rel:g}: the length of a power-function average is above 0 and at most {LONGEST_EMA}")
    ratio = sigma_rel**-2
    return float(np.roots([1, 7, 16 - ratio, 12 - ratio]).real.max())


def length(gamma: float) -> float:
    """The relative length of an exponent: the inverse of `exponent`."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def coefficients(stored: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """How much of each stored average makes the wanted one, and what is left over: the distance of the profiles as a share
    of the wanted one's norm. By least squares between profiles; a wanted one that is stored is itself.

    Beyond the paper, the shares sum to 1: what training has not moved, which is most of a fine-tuned weight, stays as it is.
    """
    if wanted in stored:
        return [float(one == wanted) for one in stored], 0.0
    products = _products([*stored, wanted]) * wanted.images_seen
    among, towards, whole = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    bordered = np.ones((len(stored) + 1, len(stored) + 1))  # the multiplier of the sum is its last unknown
    bordered[:-1, :-1], bordered[-1, -1] = among, 0.0
    found = np.linalg.lstsq(bordered, np.append(towards, 1.0), rcond=1e-13)[0][:-1]
    rest = whole - 2 * found @ towards + found @ among @ found
    return found.tolist(), math.sqrt(max(rest, 0.0) / whole)


def _products(profiles: Sequence[Profile]) -> np.ndarray:
    """The integrals of each profile times each other one [N, N]:

    (a + 1) (b + 1) / (a + b + 1) * (s / t)^b / t, for exponents a, b of averages that end at s <= t.
    """
    ends = np.array([float(one.images_seen) for one in profiles])
    powers = np.array([one.gamma for one in profiles])
    early, late = np.minimum(ends[:, None], ends), np.maximum(ends[:, None], ends)
    of_late = np.where(ends[:, None] < ends, powers, powers[:, None])
    found: np.ndarray = (powers[:, None] + 1) * (powers + 1) / (powers[:, None] + powers + 1) * (early / late) ** of_late / late
    return found
