"""One stage on a running cluster: `python -m deploy.submit train --config configs/sd14.yaml [--train.images=50000 ...]`.

The cluster is at $RAY_ADDRESS (default http://127.0.0.1:8265, where `ray dashboard cluster.yaml` or `kubectl port-forward`
puts it), and its token is $RAY_AUTH_TOKEN or ~/.ray/auth_token. Settings are checked here before anything is sent.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from momalisa.config import ConfigError, Settings, from_file

HOME = Path(__file__).parents[1]
STAGES = ("collect", "caption", "encode", "train", "promote", "pipeline")
ADDRESS = "http://127.0.0.1:8265"
AGENT_TRIES = 30  # the dashboard answers before the agent that starts jobs does


def check(settings: Settings) -> None:
    """Raises ValueError where a job would wait for GPUs that will never come."""
    train, cluster = settings.train, settings.cluster
    wanted, most = train.workers * train.gpus_per_worker, cluster.max_workers * cluster.gpus_per_node
    if wanted > most:
        raise ValueError(
            f"train.workers={train.workers} x gpus_per_worker={train.gpus_per_worker:g} are {wanted:g} GPUs, but the cluster has "
            f"at most {most} (cluster.max_workers={cluster.max_workers} x gpus_per_node={cluster.gpus_per_node})"
        )


def submit(ray: list[str], address: str, stage: str, config: str, overrides: list[str]) -> str:
    """Send the code and start the job; returns its name. Raises ValueError with what Ray said."""
    name = f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    job = ["python", "-m", f"ray_jobs.{stage}", "--config", config, *overrides]
    how = ["--address", address, "--runtime-env", "runtime_env.yaml", "--no-wait", "--submission-id", name]
    for _ in range(AGENT_TRIES):
        begun = subprocess.run([*ray, "submit", *how, "--", *job], cwd=HOME, capture_output=True, text=True, check=False)
        said = begun.stdout + begun.stderr
        if begun.returncode == 0:
            return name
        if "No available agent" not in said:
            break
        time.sleep(1)
    raise ValueError(explained(address, said))


def explained(address: str, said: str) -> str:
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    if "401" in said or "403" in said or "nauthenticated" in said or "uthentication" in said:
        return f"{address} wants another token ({last}); export RAY_AUTH_TOKEN, or write it to ~/.ray/auth_token"
    if "Failed to connect" in said or "Connection" in said:
        return (
            f"no cluster answers at {address} ({last}); open the tunnel first: `ray dashboard cluster.yaml`, or set RAY_ADDRESS"
        )
    return f"{address} did not take the job: {said[-2000:]}"


def follow(ray: list[str], address: str, name: str) -> int:
    """Show its output until it ends; returns an exit status: 0 if it succeeded."""
    try:
        subprocess.run([*ray, "logs", "--address", address, "--follow", name], cwd=HOME, check=False)
    except KeyboardInterrupt:
        where = "" if address == ADDRESS else f" --address {address}"
        print(
            f"\n{name} goes on without you. Look again:  ray job logs{where} --follow {name}\n"
            f"Stop it (training writes a checkpoint first):  ray job stop{where} {name}",
            flush=True,
        )
        return 130
    status = subprocess.run([*ray, "status", "--address", address, name], capture_output=True, text=True, check=False).stdout
    if "succeeded" in status.lower():
        return 0
    print(f"{name}: {status.strip().splitlines()[-1] if status.strip() else 'its status is not known'}", file=sys.stderr)
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.submit", description=__doc__, allow_abbrev=False)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--config", required=True, help="a settings file below this folder")
    options, overrides = parser.parse_known_args()
    try:
        check(from_file(str(HOME / options.config), overrides))
    except (ConfigError, ValueError) as error:
        parser.exit(2, f"submit: {error}\n")
    address, ray = os.environ.get("RAY_ADDRESS") or ADDRESS, [str(Path(sys.executable).parent / "ray"), "job"]
    try:
        name = submit(ray, address, options.stage, options.config, overrides)
    except ValueError as error:
        sys.exit(f"submit: {error}")
    print(f"submitted {name} to {address}; Ctrl-C leaves it running", flush=True)
    sys.exit(follow(ray, address, name))


if __name__ == "__main__":
    main()
