"""One stage on a running cluster: `python -m deploy.submit train --config configs/sd14.yaml [--on gke] [--train.images=50 ...]`.

The cluster is at $RAY_ADDRESS (default http://127.0.0.1:8265, where `ray dashboard cluster.yaml` or `kubectl port-forward`
puts it), and its token is $RAY_AUTH_TOKEN or ~/.ray/auth_token. Settings are checked here before anything is sent: what
`make plan` refuses is refused (`--force` goes on over slow links).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from momalisa import cost
from momalisa.config import ConfigError, Settings, from_file
from momalisa.config.cluster import PLACEHOLDER

HOME = Path(__file__).parents[1]
STAGES = ("collect", "caption", "encode", "train", "promote", "pipeline")
ADDRESS = "http://127.0.0.1:8265"
LOST = 75  # EX_TEMPFAIL
AGENT_TRIES = 30  # the dashboard answers before the agent that starts jobs does


def check(settings: Settings, stage: str, cloud: cost.Cloud, force: bool) -> None:
    """Raises ValueError for settings that nobody has edited, and what `make plan` refuses of training."""
    if PLACEHOLDER in settings.root:
        raise ValueError(f"root={settings.root} is a placeholder; name your bucket in the settings file")
    if stage in ("train", "pipeline"):
        found = cost.estimate(settings, cloud, settings.collect.source.limit or 1000)
        if not force:
            cost.check(found, settings)


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
    if re.search(r"\b40[13]\b", said) or "nauthenticated" in said or "uthentication" in said:
        return f"{address} wants another token ({last}); export RAY_AUTH_TOKEN, or write it to ~/.ray/auth_token"
    if "Failed to connect" in said or "Connection" in said:
        return (
            f"no cluster answers at {address} ({last}); open the tunnel first: `ray dashboard cluster.yaml`, or set RAY_ADDRESS"
        )
    return f"{address} did not take the job: {said[-2000:]}"


def follow(ray: list[str], address: str, name: str) -> int:
    """`watch`, from which Ctrl-C leads away."""
    where = at(address)
    try:
        status = watch(ray, address, name)
    except KeyboardInterrupt:
        print(
            f"\n{name} goes on without you. Look again:  ray job logs{where} --follow {name}\n"
            f"Stop it (training writes a checkpoint first):  ray job stop{where} {name}",
            flush=True,
        )
        return 130
    if status == LOST:
        print(
            f"{name}: {address} was lost, and the job goes on without it. Open the tunnel again (`ray dashboard cluster.yaml`), "
            f"then:  ray job logs{where} --follow {name}",
            file=sys.stderr,
        )
    return status


def watch(ray: list[str], address: str, name: str) -> int:
    """Show a job's output until it ends; returns 0 if it succeeded, 1 if not, LOST where its end was not seen."""
    subprocess.run([*ray, "logs", "--address", address, "--follow", name], cwd=HOME, check=False)
    asked = [*ray, "status", "--address", address, name]
    status = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if "succeeded" in status.lower():
        return 0
    if re.search(r"\b(failed|stopped)\b", status, re.IGNORECASE):
        print(f"{name}: {status.splitlines()[-1]}", file=sys.stderr)
        return 1
    return LOST


def at(address: str) -> str:
    """The option that names a cluster, where it is not Ray's default."""
    return "" if address == ADDRESS else f" --address {address}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.submit", description=__doc__, allow_abbrev=False)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--config", required=True, help="a settings file below this folder")
    parser.add_argument("--on", choices=["runpod", "gke"], default="runpod", help="where the cluster is: how fast its links are")
    parser.add_argument("--force", action="store_true", help="full fine-tuning over slow links too")
    options, overrides = parser.parse_known_args()
    try:
        check(from_file(str(HOME / options.config), overrides), options.stage, options.on, options.force)
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
