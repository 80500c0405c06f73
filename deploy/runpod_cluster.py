"""cluster.yaml: what `ray up` makes on RunPod."""

from __future__ import annotations

from typing import Any

from deploy import endpoint
from momalisa.config import Cluster

SSH_PORT = 2222
HEADER = """#
# `ray up cluster.yaml` rents a head and, as jobs ask for GPUs, workers; `ray down cluster.yaml` gives all of them back.
# $RUNPOD_API_KEY is read on the laptop; the nodes get their secrets from RunPod's secret store by name, the head
# RUNPOD_ACCOUNT_KEY too. docs/operations.md has the commands in order.
"""
SERVED = """#
# `serve deploy serve/runpod.yaml` puts it on the cluster at http://127.0.0.1:8265, where `ray dashboard cluster.yaml` puts the
# head. The settings file is the image's own: edit it before you build. The endpoint listens on the head's loopback:
# `ray dashboard --port 8000 --remote-port 8000 cluster.yaml` brings it here.
"""
STOP = "ray stop"
PREPARE = "ulimit -n 65536; . $MOMALISA_HOME/deploy/node.sh"
HEAD = (
    f"{PREPARE}; ray start --head --port=6379 --node-ip-address=$NODE_IP --dashboard-host=127.0.0.1 --disable-usage-stats "
    "--autoscaling-config=~/ray_bootstrap_config.yaml"
)
WORKER = f"{PREPARE}; ray start --address=$RAY_HEAD_IP:6379 --node-ip-address=$NODE_IP --disable-usage-stats"


def served(cluster: Cluster, config: str) -> dict[str, Any]:
    """What Serve is given there: a generator on each GPU, behind the head's loopback."""
    return endpoint.document(config, [], cluster.max_workers * cluster.gpus_per_node, host="127.0.0.1")


def document(cluster: Cluster) -> dict[str, Any]:
    """Every key spelled out: an external provider has no defaults."""
    return {
        "cluster_name": cluster.name,
        "max_workers": cluster.max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": cluster.idle_minutes,
        "provider": provider(cluster),
        "auth": {"ssh_user": "ray", "ssh_private_key": "~/.ssh/momalisa"},
        "head_node_type": "head",
        "available_node_types": {
            "head": node_type(cluster, [cluster.head_gpu.runpod], 0, 0, {"CPU": 2, "GPU": 0}, gpus=1),
            "gpu": node_type(
                cluster,
                [gpu.runpod for gpu in cluster.gpus],
                cluster.min_workers,
                cluster.max_workers,
                {"CPU": cluster.cpus_per_node, "GPU": cluster.gpus_per_node},
                gpus=cluster.gpus_per_node,
            ),
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [".git", ".venv", "out"],
        "rsync_filter": [".gitignore"],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [STOP, HEAD],
        "worker_start_ray_commands": [STOP, WORKER],
    }


def provider(cluster: Cluster) -> dict[str, Any]:
    return {
        "type": "external",
        "module": "deploy.runpod.node_provider.RunpodNodeProvider",
        "use_internal_ips": False,
        "ssh_port": SSH_PORT,
        "usd_per_hour_max": cluster.usd_per_hour_max,
        "usd_total_max": cluster.usd_total_max,
        "start_timeout_s": cluster.start_timeout_s,
        "secrets": list(cluster.secrets),
        "head_secrets": list(cluster.head_secrets),
        "environment": cluster.environment | {"MOMALISA_ORPHAN_S": str(60 * cluster.orphan_minutes)},
    }


def node_type(cluster: Cluster, ids: list[str], least: int, most: int, resources: dict[str, int], gpus: int) -> dict[str, Any]:
    return {
        "min_workers": least,
        "max_workers": most,
        "resources": resources,
        "labels": {},
        "node_config": {
            "gpus": ids,
            "gpus_per_node": gpus,
            "image": cluster.image,
            "disk_gb": cluster.disk_gb,
            "regions": list(cluster.regions),
        },
    }
