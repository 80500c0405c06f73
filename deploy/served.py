"""What a rented cluster's Serve is given: serve/config.yaml with the cluster's settings, a generator on each GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from momalisa.config import Settings

HEADER = """#
# `serve deploy serve/runpod.yaml` puts it on the cluster at http://127.0.0.1:8265, where `ray dashboard cluster.yaml` puts the
# head. The settings file is the image's own: edit it before you build. The endpoint listens on the head's loopback:
# `ray dashboard --port 8000 --remote-port 8000 cluster.yaml` brings it here.
"""


def on_gpus(settings: Settings, config: str, home: Path) -> dict[str, Any]:
    """A ServeDeploySchema. The settings file is read on the nodes, relative to $MOMALISA_HOME."""
    served: dict[str, Any] = yaml.safe_load((home / "serve" / "config.yaml").read_text())
    (application,) = served["applications"]
    application["args"] |= {"config": config}
    generator = next(item for item in application["deployments"] if item["name"] == "Generator")
    generator["ray_actor_options"] = {"num_cpus": 1, "num_gpus": 1}
    generator["autoscaling_config"]["max_replicas"] = settings.cluster.max_workers * settings.cluster.gpus_per_node
    return served
