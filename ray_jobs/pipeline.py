"""pipeline: collect, caption, encode, train and promote, in that order, and the report.

    python -m ray_jobs.pipeline --config configs/demo.yaml
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.pipeline --config configs/sd14.yaml

Each stage does only what is new, so after a failure or with new works the same command goes on from there. Writes
report.html and summary.json below the root.
"""

from __future__ import annotations

import time
from typing import Any

from momalisa.config import Settings
from ray_jobs._job import job


def run(settings: Settings) -> dict[str, Any]:
    """All stages; returns the summary."""
    from momalisa import report
    from ray_jobs import caption, collect, encode, promote, train

    began, stages = time.monotonic(), []
    for number, stage in enumerate((collect, caption, encode, train, promote), 1):
        name = stage.__name__.rsplit(".", 1)[-1]
        print(f"== {number}/5 {name}", flush=True)
        stages.append(stage.run(settings))
    return report.write(settings, stages, time.monotonic() - began)


def main() -> None:
    job(__doc__, "pipeline", run, said)


def said(summary: dict[str, Any]) -> str:
    took = f"done in {summary['elapsed_s']:.0f} s" if summary["new"] else "nothing new"
    return f"{took}; the report is {summary['report']}"


if __name__ == "__main__":
    main()
