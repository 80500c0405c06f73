"""A machine says that it will be taken away: `python -m deploy.drain --within-s 25` on it.

Ray starts nothing there any more, training writes a checkpoint of its step and goes on elsewhere, and Serve moves its
replicas. KubeRay's workers run it when Kubernetes asks them to go (`preStop`), RunPod's and a workstation's by hand.
"""

from __future__ import annotations

import argparse
import sys
import time


def drain(here: str, within_s: int) -> None:
    """Tell Ray that the node with this address goes, as `ray drain-node` does. Raises SystemExit where there is none."""
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, as are the next two
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

    gcs = GcsClient(address=canonicalize_bootstrap_address_or_die("auto"))
    nodes = gcs.get_all_node_info().items()
    found = [node for node, known in nodes if (known.node_manager_address, known.state) == (here, GcsNodeInfo.ALIVE)]
    if not found:
        sys.exit(f"drain: no live Ray node has the address {here}")
    gone_ms, reason = int((time.time() + within_s) * 1000), DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why_not = gcs.drain_node(found[0].hex(), reason, "the machine will be taken away", gone_ms)
    if not accepted:
        sys.exit(f"drain: Ray did not take the notice: {why_not}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.drain", description=__doc__)
    parser.add_argument("--within-s", type=int, default=25, help="how long until the machine is gone")
    parser.add_argument("--wait", action="store_true", help="return only then")
    options = parser.parse_args()
    import ray

    began = time.monotonic()
    drain(ray.util.get_node_ip_address(), options.within_s)
    if options.wait:
        time.sleep(max(0.0, options.within_s - (time.monotonic() - began)))


if __name__ == "__main__":
    main()
