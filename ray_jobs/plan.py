"""plan: what a run will take, before anything is rented: nodes, hours, dollars, bytes, and what that rests on.

    python -m ray_jobs.plan --config configs/sd14.yaml --on runpod [--works 1000] [--force] [--train.workers=4 ...]

`--on` is runpod or gke. It exits with 1, and the arithmetic, where the settings want more GPUs or money than the cluster
may have, or full fine-tuning over links so slow that the nodes would wait for each other; `--force` prints it anyway.
"""

from __future__ import annotations

import argparse
import sys

from momalisa import cost
from momalisa.config import command_line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--on", choices=["runpod", "gke"], default="runpod")
    parser.add_argument("--works", type=int)
    parser.add_argument("--force", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    settings = command_line(__doc__, "ray_jobs.plan", rest)
    try:
        found = cost.estimate(settings, options.on, options.works or settings.collect.source.limit or 1000)
        print(cost.describe(found))
        if found.usd > settings.cluster.usd_total_max:
            end = "it would be cut off there" if options.on == "runpod" else "on GKE nothing cuts it off, so set a budget alert"
            print(f"warning  that is above cluster.usd_total_max={settings.cluster.usd_total_max:g}: {end}")
        if not options.force:
            cost.check(found, settings)
    except cost.Refused as refused:
        sys.exit(f"plan: {refused}")


if __name__ == "__main__":
    main()
