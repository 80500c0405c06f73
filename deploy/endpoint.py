"""serve/config.yaml for machines with GPUs, open to the network around them: what GKE, RunPod and docker compose put up.

python -m deploy.endpoint --config configs/sd14.yaml [--root=gs://bucket/moma ...] > serve.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

HOME = Path(__file__).parents[1]


def document(config: str, overrides: list[str], max_replicas: int, host: str = "0.0.0.0") -> dict[str, Any]:  # noqa: S104
    """A Serve file; `config` is relative to $MOMALISA_HOME. A container's own loopback is nobody's, so it listens everywhere:
    what is published, and to whom, is the container's affair."""
    served: dict[str, Any] = yaml.safe_load((HOME / "serve" / "config.yaml").read_text())
    served["http_options"]["host"] = host
    (application,) = served["applications"]
    application["args"] |= {"config": config, "overrides": overrides}
    generator = next(item for item in application["deployments"] if item["name"] == "Generator")
    generator["ray_actor_options"] = {"num_cpus": 1, "num_gpus": 1}
    generator["autoscaling_config"]["max_replicas"] = max_replicas
    return served


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.endpoint", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--max-replicas", type=int, default=1, help="GPUs that may serve")
    options, overrides = parser.parse_known_args()
    print(yaml.safe_dump(document(options.config, overrides, options.max_replicas), sort_keys=False), end="")


if __name__ == "__main__":
    main()
