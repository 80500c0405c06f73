"""What a cluster has cost so far: each pod's own rate times its time, kept across restarts of the autoscaler."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

FOLDER = "MOMALISA_STATE"


class Ledger:
    """USD by pod, in `$MOMALISA_STATE` (default ~/.momalisa)/spend-<cluster>.json of the machine that counts."""

    def __init__(self, cluster: str) -> None:
        folder = Path(os.environ.get(FOLDER) or Path.home() / ".momalisa")
        self.path = folder / f"spend-{cluster}.json"
        self._entries: dict[str, dict[str, float]] = {}  # by pod: `at` (seconds since 1970) and `usd` up to then
        with contextlib.suppress(OSError, ValueError):
            self._entries = dict(json.loads(self.path.read_text()))

    def count(self, pods: Iterable[dict[str, Any]], now: float | None = None) -> float:
        """Add what these pods cost since they were last counted (at first: since they were made); returns the sum in USD."""
        now = time.time() if now is None else now
        for pod in pods:
            entry = self._entries.setdefault(pod["id"], {"at": min(made_at(pod), now), "usd": 0.0})
            entry["usd"] += float(pod["cost"]) * max(now - entry["at"], 0.0) / 3600
            entry["at"] = now
        self._write()
        return self.total

    @property
    def total(self) -> float:
        return sum(entry["usd"] for entry in self._entries.values())

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._entries, sort_keys=True))
        partial.replace(self.path)


def made_at(pod: dict[str, Any]) -> float:
    """Seconds since 1970."""
    return datetime.fromisoformat(str(pod["createdAt"])).timestamp()
