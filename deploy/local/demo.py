"""The whole of MOMA Lisa on one machine: `python deploy/local/demo.py up`, and `stop` to end it.

Starts what is not running yet (a Ray head with its dashboard, the miniature museum; both on loopback), submits the
pipeline with `ray job submit`, deploys the service, asks it for a picture, and leaves everything up. Each process that
it starts is written to out/demo/run/NAME.pid, and `stop` ends exactly those.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[2]
OUT = HOME / "out" / "demo"
RUN = OUT / "run"
BIN = Path(sys.executable).parent
GCS_PORT = int(os.environ.get("MOMALISA_RAY_PORT", "6389"))
DASHBOARD_PORT = int(os.environ.get("MOMALISA_DASHBOARD_PORT", "8265"))
WING_PORT = int(os.environ.get("MOMALISA_WING_PORT", "8930"))
SERVE_PORT = int(os.environ.get("MOMALISA_SERVE_PORT", "8000"))
DASHBOARD = f"http://127.0.0.1:{DASHBOARD_PORT}"
WING = f"http://127.0.0.1:{WING_PORT}"
SERVICE = f"http://127.0.0.1:{SERVE_PORT}"
PROMPT = "a boat on the sea"


# Everything is on loopback and ends with `make stop`; on a cluster, set RAY_AUTH_MODE=token.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=3) as response:
        return bool(response.status == 200)
    return False


def wait_for(url: str, name: str, timeout_s: float) -> None:
    """Raises SystemExit naming the log when nothing answers in time."""
    began = time.monotonic()
    while not answers(url):
        if time.monotonic() - began > timeout_s:
            raise SystemExit(f"demo: {name} did not answer at {url} within {timeout_s:.0f} s; see {RUN}/{name}.log")
        time.sleep(0.5)


def free(port: int, variable: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise SystemExit(f"demo: port {port} is taken by another program; choose one with {variable}=...") from None


def alive(pid_file: Path) -> int | None:
    """The process group that a pid file names, if that very process still runs."""
    try:
        pid, started = pid_file.read_text().split()
        return int(pid) if start_time(int(pid)) == started else None
    except (OSError, ValueError):
        return None


def start_time(pid: int) -> str:
    """When a process started, so that a reused number is not taken for it."""
    if Path("/proc").is_dir():
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    listing = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return listing.stdout.strip().replace(" ", "_")


def start(name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
    """Start a process in a session of its own, its output in run/NAME.log."""
    RUN.mkdir(parents=True, exist_ok=True)
    with open(RUN / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            command, cwd=HOME, env={**os.environ, **(environment or {})}, stdout=log, stderr=log, start_new_session=True
        )
    (RUN / f"{name}.pid").write_text(f"{process.pid} {start_time(process.pid)}")


def start_ray() -> None:
    if alive(RUN / "ray.pid") and answers(f"{DASHBOARD}/api/version"):
        say("Ray is running")
        return
    free(GCS_PORT, "MOMALISA_RAY_PORT")
    free(DASHBOARD_PORT, "MOMALISA_DASHBOARD_PORT")
    say("starting Ray")
    address = ["--node-ip-address=127.0.0.1", f"--port={GCS_PORT}"]
    with socket.socket() as probe:  # the agent's usual port may be another Ray's; then no job could be submitted
        probe.bind(("127.0.0.1", 0))
        agent = f"--dashboard-agent-listen-port={probe.getsockname()[1]}"
    dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD_PORT}", agent, "--disable-usage-stats"]
    size = [f"--num-cpus={max(4, os.cpu_count() or 1)}", "--object-store-memory=500000000"]
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"  # a job's `python` is this one
    start("ray", [str(BIN / "ray"), "start", "--head", "--block", *address, *dashboard, *size], {"PATH": path})
    wait_for(f"{DASHBOARD}/api/version", "ray", 90)


def start_wing() -> None:
    if alive(RUN / "wing.pid") and answers(f"{WING}/collection.csv"):
        say("the miniature museum is open")
        return
    free(WING_PORT, "MOMALISA_WING_PORT")
    start("wing", [sys.executable, "-m", "momalisa.miniature.wing", "--port", str(WING_PORT)])
    wait_for(f"{WING}/collection.csv", "wing", 30)


def submit_pipeline() -> None:
    """`ray job submit` of the whole pipeline, its output followed."""
    say(f"submitting the pipeline; watch it at {DASHBOARD}")
    job = ["python", "-m", "ray_jobs.pipeline", "--config", "configs/demo.yaml", f"--root={OUT}"]
    source = f"--collect.source.location={WING}/collection.csv"
    name, ray = f"demo-{time.time_ns()}", [str(BIN / "ray"), "job"]
    how = ["--address", DASHBOARD, "--runtime-env", "runtime_env.yaml", "--no-wait", "--submission-id", name]
    for _ in range(30):  # the dashboard answers before the agent that starts jobs does
        begun = subprocess.run([*ray, "submit", *how, "--", *job, source], cwd=HOME, capture_output=True, text=True, check=False)
        if begun.returncode == 0 or "No available agent" not in begun.stdout + begun.stderr:
            break
        time.sleep(2)
    if begun.returncode:
        raise SystemExit(f"demo: the pipeline was not accepted:\n{begun.stdout}{begun.stderr}")
    subprocess.run([*ray, "logs", "--address", DASHBOARD, "--follow", name], cwd=HOME, check=False)
    while (status := job_status(name)) in {"PENDING", "RUNNING"}:
        time.sleep(0.5)
    if status != "SUCCEEDED":
        raise SystemExit(f"demo: the pipeline ended as {status}; its log is above and in the dashboard")


def job_status(name: str) -> str:
    with urllib.request.urlopen(f"{DASHBOARD}/api/jobs/{name}", timeout=10) as response:
        return str(json.load(response)["status"])


def deploy() -> str:
    """`serve deploy`, wait until it is healthy, and return the checkpoint it serves."""
    import yaml

    config = yaml.safe_load((HOME / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = SERVE_PORT
    config["applications"][0]["args"] = {
        "config": str(HOME / "configs" / "demo.yaml"),
        "overrides": [f"--root={OUT}"],
        "release": json.loads((OUT / "summary.json").read_text())["checkpoint"],  # a new checkpoint is a new deployment
    }
    path = RUN / "serve.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    say("deploying the service")
    subprocess.run([str(BIN / "serve"), "deploy", str(path), "--address", DASHBOARD], cwd=HOME, check=True)
    wait_for(f"{SERVICE}/healthz", "ray", 120)
    with urllib.request.urlopen(f"{SERVICE}/healthz", timeout=10) as response:
        return str(json.load(response).get("checkpoint"))


def first_picture() -> Path:
    """Ask the service for a picture over HTTP and keep it."""
    body = json.dumps({"prompt": PROMPT, "n": 1, "seed": 7, "response_format": "b64_json"}).encode()
    request = urllib.request.Request(
        f"{SERVICE}/v1/images/generations", data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    path = OUT / "first.png"
    path.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    return path


def up(install_s: float) -> None:
    began = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    start_ray()
    start_wing()
    submit_pipeline()
    checkpoint = deploy()
    picture = first_picture()
    elapsed_s = time.monotonic() - began
    summary = json.loads((OUT / "summary.json").read_text())
    if "install_s" not in summary:  # a run that found nothing new leaves the figures of the one that did
        summary |= {"elapsed_s": round(elapsed_s, 1), "install_s": install_s}
    summary |= {"serving": checkpoint, "picture": picture.name}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    say(f"done in {elapsed_s:.0f} s (installation before that: {install_s:.0f} s)")
    say(f"dashboard  {DASHBOARD}")
    say(f"page       {SERVICE}/")
    say(f"report     file://{OUT}/report.html")
    say(f"picture    file://{picture}")
    say("`make stop` ends it")


def stop() -> None:
    """End the processes that `up` started, and wait until they are gone."""
    for name in ("ray", "wing"):
        pid_file = RUN / f"{name}.pid"
        pid = alive(pid_file)
        if pid is None:
            continue
        say(f"stopping {name}")
        os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + 5  # nothing is lost by a kill
        while alive(pid_file) and time.monotonic() < deadline:
            time.sleep(0.2)
        if alive(pid_file):
            os.killpg(pid, signal.SIGKILL)
        pid_file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up").add_argument("--install-seconds", type=float, default=0.0)
    commands.add_parser("stop")
    options = parser.parse_args()
    if options.command == "up":
        up(options.install_seconds)
    else:
        stop()


if __name__ == "__main__":
    main()
