"""How every job finds its Ray: the cluster it was submitted to, or a small one of its own on this machine."""

from __future__ import annotations

import logging
import os


def connect() -> None:
    """Connect this process to Ray; does nothing if it is connected already.

    `RAY_ADDRESS` names a cluster (`ray job submit` sets it on the node where a job starts). Without it Ray starts
    on this machine, without a dashboard, and stops with this process. What workers print comes to the driver's log.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else each line of a training worker comes twice
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "").strip()
    dashboard = None if address else False
    ray.init(address=address or "local", include_dashboard=dashboard, ignore_reinit_error=True, logging_level=logging.WARNING)
