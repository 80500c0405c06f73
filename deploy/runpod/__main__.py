"""The account's pods of MOMA Lisa: `python -m deploy.runpod ls`, and `gc` to give back what no cluster owns any more.
(`leave` is for a pod's own use: it gives that very pod back.)

A worker is nobody's when its cluster has no head (its head was terminated by hand, or died), and a pod that failed is of
no use. Pods that were not made by this program are never touched.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from deploy.runpod.client import FAILED, Client, Pod, RunpodError
from deploy.runpod.node_provider import CLUSTER, POD_ID, kind_of


def ours(pods: list[Pod]) -> list[Pod]:
    return sorted((pod for pod in pods if CLUSTER in pod["env"]), key=lambda pod: (pod["env"][CLUSTER], pod["name"]))


def ownerless(pods: list[Pod]) -> list[Pod]:
    """Of our pods: those that failed, and workers of clusters without a head."""
    led = {pod["env"][CLUSTER] for pod in ours(pods) if kind_of(pod) == "head" and pod["status"] not in FAILED}
    return [pod for pod in ours(pods) if pod["status"] in FAILED or pod["env"][CLUSTER] not in led]


def line(pod: Pod) -> str:
    gpu = pod.get("gpu", {})
    what = f"{gpu.get('count', 0)}x {gpu.get('id', 'cpu')}"
    return f"{pod['id']}  {pod['name']}  {pod['status']}  {what}  {pod['dataCenterId']}  ${pod['cost']:.2f}/h"


def run(options: Any) -> None:
    """Raises RunpodError."""
    client = Client.from_environment()
    if options.command == "leave":
        client.terminate(os.environ[POD_ID])
        return
    found = ours(pods := client.pods())
    if options.command == "ls":
        for pod in found:
            print(line(pod))
        print(f"{len(found)} pods, ${sum(pod['cost'] for pod in found):.2f}/h")
        return
    lost = ownerless(pods)
    for pod in lost:
        print(line(pod))
    if lost and not options.yes and input(f"terminate these {len(lost)}? [y/N] ").strip().lower() != "y":
        sys.exit("nothing was done")
    for pod in lost:
        client.terminate(pod["id"])
    print(f"{len(lost)} pods given back")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.runpod", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="this program's pods and what they cost")
    commands.add_parser("leave", help="on a pod: give this pod back")
    commands.add_parser("gc", help="give back pods that no cluster owns").add_argument("--yes", action="store_true")
    try:
        run(parser.parse_args())
    except RunpodError as error:
        sys.exit(f"runpod: {error}")


if __name__ == "__main__":
    main()
