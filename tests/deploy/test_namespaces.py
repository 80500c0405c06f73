"""The machines that tests make: those of a test run that was ended by a signal are removed by the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.namespaces import HOME, clear, missing, processes

OWNER = """
import sys, time
from pathlib import Path
from tests.deploy.namespaces import Machines
machines = Machines(Path(sys.argv[1]))
with machines.up():
    machines.start("one", {})
    machines.machines["one"].run("true")
    print(machines.bridge, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_what_a_run_left_that_was_ended_is_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, cwd=HOME, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        bridge = owner.stdout.readline().strip()
        space, link = f"{bridge}-one", Path("/sys/class/net") / bridge
        assert space not in clear(), "its owner lives"
        owner.terminate()
    assert processes(space)
    assert link.exists()
    assert clear().count(space) == 1
    assert not processes(space)
    assert not link.exists()
    assert not (Path("/run/netns") / space).exists()
    assert not (Path("/etc/netns") / space).exists()
