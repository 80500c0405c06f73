"""`make cloud` with recorded `ray` and `serve`: what runs in which order, and that everything is given back whatever fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.namespaces import HOME

PROGRAM = """
import sys
from pathlib import Path
from deploy import once
bin = Path(sys.argv.pop(1))
once.BIN, once.JOB, once.LOOK_AGAIN_S = bin, [str(bin / "ray"), "job"], 0
once.drifted = lambda *_: {}
once.main()
"""
# A tunnel is a port that answers; `FAIL` names the command that fails, `HANG` the one that takes long.
RAY = f"""#!{sys.executable}
import http.server, os, sys, time
from pathlib import Path
words = [Path(sys.argv[0]).name, *sys.argv[1:]]
step = " ".join(words[1:3] if words[1] == "job" else words[1:2])
with open(os.environ["RECORD"], "a") as record:
    record.write(" ".join(words) + "\\n")
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
if step == "dashboard":
    http.server.HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Answer).serve_forever()
if step == os.environ.get("HANG"):
    time.sleep(60)
if step == "job status":
    lost = Path(os.environ["RECORD"] + ".lost")
    if os.environ.get("FAIL") == "tunnel" and not lost.exists():
        lost.touch()
        sys.exit(1)
    print("Job failed" if os.environ.get("FAIL") == "pipeline" else "Job succeeded")
sys.exit(step == os.environ.get("FAIL"))
"""
UP, DOWN = "ray up -y cluster.yaml", "ray down -y cluster.yaml"
Cloud = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    """Runs it, sends SIGINT once a line is recorded or said, and returns its status, the commands, and what it said."""
    for program in ("ray", "serve"):
        (tmp_path / program).write_text(RAY)
        (tmp_path / program).chmod(0o755)
    record, log = tmp_path / "record", tmp_path / "log"

    def run(*arguments: str, interrupt_at: str = "", **environment: str) -> tuple[int, list[str], str]:
        record.unlink(missing_ok=True)
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), "--config", "configs/demo.yaml", *arguments]
        env = {**os.environ, **environment, "RECORD": str(record), "PYTHONUNBUFFERED": "1"}
        with open(log, "w") as sink:
            process = subprocess.Popen(
                command, cwd=HOME, env=env, stdout=sink, stderr=sink, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while interrupt_at and interrupt_at not in log.read_text() + (record.read_text() if record.exists() else ""):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        if interrupt_at:
            os.killpg(process.pid, signal.SIGINT)
        status = process.wait(timeout=60)
        return status, record.read_text().splitlines(), log.read_text()

    return run


def steps(lines: list[str]) -> list[str]:
    """The commands without what changes from run to run."""
    return [" ".join(word for word in line.split()[: 3 if " job " in line else 2]) for line in lines]


def test_from_renting_to_giving_back(cloud: Cloud) -> None:
    status, lines, said = cloud(interrupt_at="it paints at http://127.0.0.1:")
    assert (status, lines[0], lines[-1]) == (0, UP, DOWN), said
    job = ["ray job submit", "ray job logs", "ray job status"]
    assert steps(lines) == ["ray up", "ray dashboard", *job, "ray dashboard", "ray dashboard", "serve deploy", "ray down"]
    assert "python -m ray_jobs.pipeline --config configs/demo.yaml" in lines[2]
    assert "serve/runpod.yaml --address http://127.0.0.1:" in lines[-2]
    assert "dollars" in said[: said.index("it paints")]


@pytest.mark.parametrize(
    ("fails", "last", "said"),
    [
        ("up", "ray up", "`ray up -y cluster.yaml` failed"),
        ("job submit", "ray job submit", "did not take the job"),
        ("pipeline", "ray job status", "did not succeed"),
        ("deploy", "serve deploy", "`serve deploy serve/runpod.yaml"),
    ],
)
def test_whatever_fails_everything_goes_back(cloud: Cloud, fails: str, last: str, said: str) -> None:
    status, lines, told = cloud(FAIL=fails)
    assert (status, steps(lines)[-2:]) == (1, [last, "ray down"]), told
    assert said in told


def test_what_nobody_thought_of_gives_back_too(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "serve").chmod(0o644)
    status, lines, told = cloud()
    assert (status, steps(lines)[-1]) == (1, "ray down"), told
    assert "once: PermissionError" in told


def test_ctrl_c_stops_the_job_and_gives_back(cloud: Cloud) -> None:
    status, lines, told = cloud(HANG="job logs", interrupt_at="ray job logs")
    assert (status, steps(lines)[-2:]) == (130, ["ray job stop", "ray down"]), told


def test_a_lost_tunnel_is_opened_again(cloud: Cloud) -> None:
    status, lines, told = cloud(FAIL="tunnel", interrupt_at="it paints at")
    assert status == 0, told
    assert steps(lines).count("ray job submit") == 1
    assert steps(lines).count("ray job logs") == 2


def test_what_is_kept_is_said_and_what_could_not_be_given_back(cloud: Cloud) -> None:
    status, lines, told = cloud("--keep", FAIL="pipeline")
    assert (status, DOWN in lines) == (1, False)
    assert "the cluster stays and costs money; `ray down -y cluster.yaml` gives it back" in told
    status, lines, told = cloud(FAIL="down", HANG="job logs", interrupt_at="ray job logs")
    assert (status, lines[-1]) == (1, DOWN)
    assert "something may still be rented; `python -m deploy.runpod ls` shows it" in told


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("configs/sd14.yaml", "root=gs://YOUR-BUCKET/moma is a placeholder"),
        (
            "configs/demo.yaml",
            "cluster.yaml is not what configs/demo.yaml says; python -m deploy.manifests --config configs/demo.yaml",
        ),
    ],
)
def test_nothing_is_rented_for_settings_that_cannot_work(config: str, said: str) -> None:
    command = [sys.executable, "-m", "deploy.once", "--config", config]
    refused = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert said in refused.stderr
