"""A machine says that it will be taken away: `python -m deploy.drain --within-s 25` on it.

Ray starts nothing there any more, training writes a checkpoint of its step and goes on elsewhere, and Serve moves its
replicas. KubeRay's workers run it when Kubernetes asks them to go (`preStop`), RunPod's and a workstation's by hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path


def node_id(address: str, here: str) -> str:
    """Of the raylet with this address. Raises SystemExit where there is none."""
    import ray

    ray.init(address=address, log_to_driver=False, namespace="drain")
    found = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == here]
    ray.shutdown()
    if not found:
        sys.exit(f"drain: no live Ray node has the address {here}")
    return str(found[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.drain", description=__doc__)
    parser.add_argument("--within-s", type=int, default=25, help="how long until the machine is gone")
    parser.add_argument("--wait", action="store_true", help="return only then")
    options = parser.parse_args()
    import ray

    began = time.monotonic()
    node = node_id("auto", ray.util.get_node_ip_address())
    from ray._private.services import canonicalize_bootstrap_address_or_die

    request = ["drain-node", "--address", canonicalize_bootstrap_address_or_die("auto"), "--node-id", node]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine will be taken away"]
    how = ["--deadline-remaining-seconds", str(options.within_s)]
    ray_cli = str(Path(sys.executable).parent / "ray")
    subprocess.run([ray_cli, *request, *why, *how], check=True)
    if options.wait:
        time.sleep(max(0.0, options.within_s - (time.monotonic() - began)))


if __name__ == "__main__":
    main()
