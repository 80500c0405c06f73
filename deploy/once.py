"""One command from a laptop: rents a cluster on RunPod, runs the pipeline, serves its result, and gives everything back.

    python -m deploy.once --config configs/sd14.yaml [--keep] [--force]

(`make cloud CONFIG=...`, with KEEP=1 for `--keep`.) It serves until Ctrl-C; after that, and after whatever fails before, `ray
down` follows, unless `--keep` says that the cluster stays. Before anything is rented it checks what `make plan` and `make submit`
check, and that cluster.yaml and serve/runpod.yaml are what the settings say. While training, Ctrl-C writes a checkpoint first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from deploy import submit
from deploy.manifests import drifted
from momalisa import cost
from momalisa.config import ConfigError, from_file

HOME = submit.HOME
BIN = Path(sys.executable).parent
JOB = [str(BIN / "ray"), "job"]
CLUSTER, SERVED = "cluster.yaml", "serve/runpod.yaml"
TUNNEL_WITHIN_S, SERVED_WITHIN_S = 60.0, 900.0  # the second: a worker is rented, its image pulled, the model loaded
LOOKS, LOOK_AGAIN_S = 20, 30.0  # how often, and how far apart, a lost tunnel is opened again


class Failed(Exception):
    """What did not work, in words."""


def run(program: str, *arguments: str) -> None:
    """Raises Failed."""
    if subprocess.run([str(BIN / program), *arguments], cwd=HOME, check=False).returncode:
        raise Failed(f"`{program} {' '.join(arguments)}` failed, as said above")


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).is_success
    return False


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def tunnel(remote_port: int) -> Iterator[str]:
    """The head's port on a free one here; yields its URL. Raises Failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    line = [str(BIN / "ray"), "dashboard", CLUSTER, "--port", str(port), "--remote-port", str(remote_port)]
    process = subprocess.Popen(line, cwd=HOME, stdout=subprocess.DEVNULL, start_new_session=True)  # Ctrl-C is not for it
    try:
        deadline = time.monotonic() + TUNNEL_WITHIN_S
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"`{' '.join(line[1:])}` did not open")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def pipeline(config: str) -> None:
    """Run it to its end, its output shown, through another tunnel where one is lost. Raises Failed or KeyboardInterrupt."""
    with tunnel(8265) as address:
        try:
            name = submit.submit(JOB, address, "pipeline", config, [])
        except ValueError as error:
            raise Failed(str(error)) from None
        status = watch(address, name)
    for _ in range(LOOKS):
        if status != submit.LOST:
            break
        print(f"once: the tunnel was lost, {name} goes on; looking again", flush=True)
        time.sleep(LOOK_AGAIN_S)
        with contextlib.suppress(Failed), tunnel(8265) as address:
            status = watch(address, name)
    if status:
        raise Failed(f"{name} did not succeed")


def watch(address: str, name: str) -> int:
    """As `submit.watch`. Ctrl-C stops the job, which writes a checkpoint first, and is raised."""
    try:
        return submit.watch(JOB, address, name)
    except KeyboardInterrupt:
        subprocess.run([*JOB, "stop", "--address", address, name], cwd=HOME, check=False)
        raise


def serve() -> None:
    """Deploy, and stay until Ctrl-C. Raises Failed."""
    with tunnel(8265) as address, tunnel(8000) as endpoint:
        run("serve", "deploy", SERVED, "--address", address)
        deadline = time.monotonic() + SERVED_WITHIN_S
        while not answers(f"{endpoint}/healthz"):
            if time.monotonic() > deadline:
                raise Failed(f"nothing was served within {SERVED_WITHIN_S:.0f} s; `serve status --address {address}` says why")
            time.sleep(1)
        print(f"once: it paints at {endpoint} until Ctrl-C", flush=True)
        signal.pause()


def go(config: str, keep: bool) -> int:
    """Returns an exit status: 0 where it served until Ctrl-C."""
    status = 130
    try:
        run("ray", "up", "-y", CLUSTER)
        pipeline(config)
        status = 0
        serve()
    except Exception as error:  # whatever it is, nothing stays rented for it
        status = 1
        print(f"once: {error if isinstance(error, Failed) else repr(error)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("once: asked to end", flush=True)
    if keep:
        print(f"once: the cluster stays and costs money; `ray down -y {CLUSTER}` gives it back", flush=True)
        return status
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # no second Ctrl-C between here and the last pod; `ray down` inherits it
    try:
        run("ray", "down", "-y", CLUSTER)
    except Failed as failed:
        sys.exit(f"once: {failed}: something may still be rented; `python -m deploy.runpod ls` shows it")
    return status


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.once", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a settings file below this folder, and in the image")
    parser.add_argument("--keep", action="store_true", help="no `ray down` in the end")
    parser.add_argument("--force", action="store_true", help="full fine-tuning over slow links too")
    options = parser.parse_args()
    try:
        settings = from_file(str(HOME / options.config))
        print(cost.describe(cost.estimate(settings, "runpod", settings.collect.source.limit or 1000)), flush=True)
        submit.check(settings, "pipeline", "runpod", options.force)
    except (ConfigError, ValueError) as error:
        parser.exit(2, f"once: {error}\n")
    if changed := [path for path in drifted(settings, options.config) if path in (Path(CLUSTER), Path(SERVED))]:
        parser.exit(
            2, f"once: {changed[0]} is not what {options.config} says; python -m deploy.manifests --config {options.config}\n"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(go(options.config, options.keep))


if __name__ == "__main__":
    main()
