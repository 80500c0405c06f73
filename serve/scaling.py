"""How many replicas: enough that no work that was accepted waits longer than `target_wait_s`.

Named by `autoscaling_config.policy` in the Serve config; the numbers come from `Generator.record_autoscaling_stats`.
"""

from __future__ import annotations

import math
from typing import Any


class ByPendingWork:
    """Serve's policy: (context) -> (replicas, state). Serve applies its own bounds and delays to it."""

    def __init__(self, target_wait_s: float = 10.0) -> None:
        self.target_wait_s = target_wait_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        pending = context.aggregated_metrics.get("pending_s", {})
        wanted = math.ceil(sum(pending.values()) / self.target_wait_s) if pending else 0
        return max(wanted, int(context.total_num_requests > 0)), {}
