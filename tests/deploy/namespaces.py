"""Machines on this machine: network, mount and process namespaces on a bridge, each with an address and a home of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HOME = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NETNS_ETC = Path("/etc/netns")
OWNED = Path("/run/momalisa-machines")  # a file for each bridge, locked for as long as the process lives that made it


def missing() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    lacking = [
        tool
        for tool in ("ip", "unshare", "sshd", "rsync", "pgrep")
        if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin")
    ]
    if lacking:
        return f"needs {', '.join(lacking)} (apt-get install iproute2 util-linux openssh-server rsync procps)"
    probe = f"mo{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "may not make network namespaces here"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


def clear() -> list[str]:
    """Remove the machines whose owner is gone (a test run that a signal ended tidies nothing up); returns their names."""
    found = []
    for file in OWNED.glob("*"):
        with open(file) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            for space in Path("/run/netns").glob(f"mo{file.name}-*"):
                for pid in processes(space.name):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                remove(space.name)
                found.append(space.name)
            ip("link", "del", f"mo{file.name}", check=False)
            file.unlink(missing_ok=True)
    return found


def processes(space: str) -> list[int]:
    """Those in a network namespace."""
    shown = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    return [int(pid) for pid in shown.stdout.split()]


def remove(space: str) -> None:
    """A network namespace without processes, once they are gone, and with it the cable that ends there."""
    deadline = time.monotonic() + 20
    while left := processes(space):
        assert time.monotonic() < deadline, f"{space} still has the processes {left}"
        time.sleep(0.02)
    ip("netns", "del", space, check=False)
    shutil.rmtree(NETNS_ETC / space, ignore_errors=True)


@dataclass
class Machine:
    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes]
    env: dict[str, str]

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command in this machine's namespaces."""
        first = self._first()
        return ["nsenter", "-t", first, "-n", "-m", "-p", f"--wd={HOME}", "--", *command]

    def _first(self) -> str:
        """Its first process, once that is the entrypoint."""
        deadline = time.monotonic() + 20
        while True:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            if children and b"mount" not in (line := Path(f"/proc/{children[0]}/cmdline").read_bytes()) and b"entrypoint" in line:
                return children[0]
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.02)

    def run(self, script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A bash script on this machine, in its environment."""
        line = self.inside("bash", "-c", script)
        return subprocess.run(line, env=self.env, cwd=HOME, capture_output=True, text=True, check=check, timeout=120)


@dataclass
class Machines:
    """A bridge and what hangs on it. `start` and `kill` make it a fake RunPod's host."""

    folder: Path
    image: dict[str, str] = field(default_factory=dict)  # the environment that the container image brings
    uid: int = 0  # of its first process and what comes of it; 1000 is the image's `ray`
    machines: dict[str, Machine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tag = secrets.token_hex(3)
        self.bridge, self.net = f"mo{self.tag}", f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
        self.gateway, self._next = f"{self.net}.1", 10

    @contextlib.contextmanager
    def up(self) -> Iterator[Machines]:
        clear()
        OWNED.mkdir(exist_ok=True)
        owned = OWNED / self.tag
        with open(owned, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self._bridged():
                yield self
            owned.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _bridged(self) -> Iterator[None]:
        ip("link", "add", self.bridge, "type", "bridge")
        try:
            ip("addr", "add", f"{self.gateway}/24", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
            yield
        finally:
            for name in list(self.machines):
                self.kill(name)
            ip("link", "del", self.bridge, check=False)

    def start(self, name: str, env: dict[str, str]) -> str:
        """Boot a machine whose first process is the image's entrypoint; returns its address."""
        self._next += 1
        address, space = f"{self.net}.{self._next}", f"mo{self.tag}-{name}"
        near, far = f"v{self.tag[:4]}{self._next}a", f"v{self.tag[:4]}{self._next}b"
        folder = self.folder / name
        for part in ("root", "ray"):
            (folder / part).mkdir(parents=True)
        (NETNS_ETC / space).mkdir(parents=True)
        (NETNS_ETC / space / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}.runpod.internal {name}\n")
        (NETNS_ETC / space / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")  # no DNS
        ip("netns", "add", space)
        ip("link", "add", near, "type", "veth", "peer", "name", far)
        ip("link", "set", far, "netns", space)
        ip("link", "set", near, "master", self.bridge, "up")
        ip("-n", space, "addr", "add", f"{address}/24", "dev", far)
        ip("-n", space, "link", "set", far, "up")
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", space, "route", "add", "default", "via", self.gateway)
        Path("/tmp/ray").mkdir(exist_ok=True)
        home = folder / "root"  # this machine's own passwd names it: the host's python may lie below /root
        users = (
            f"root:x:0:0::{home}:/bin/bash\nray:x:1000:1000::{home}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        )
        (folder / "passwd").write_text(users)
        os.chown(home, self.uid, self.uid)
        become = f"setpriv --reuid {self.uid} --regid {self.uid} --clear-groups --pdeathsig KILL " if self.uid else ""
        script = (
            f"mount --bind {folder}/passwd /etc/passwd && mount --bind {folder}/ray /tmp/ray && "
            f"exec {become}{HOME}/deploy/entrypoint.sh"
        )
        container = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc", "bash", "-c", script]
        base = {
            "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "MOMALISA_HOME": str(HOME),
            "PYTHONPATH": str(HOME),
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",
        }
        env = {**base, **self.image, **env}
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(["ip", "netns", "exec", space, *container], env=env, stdout=log, stderr=log)
        self.machines[name] = Machine(name, address, folder, process, env)
        return address

    def kill(self, name: str) -> None:
        """SIGKILL of every process of the machine; none is left when this returns. Then the machine goes."""
        if (machine := self.machines.pop(name, None)) is None:
            return
        machine.process.send_signal(signal.SIGKILL)
        machine.process.wait()
        remove(f"mo{self.tag}-{name}")

    def cut(self, name: str) -> None:
        """The cable is out: nothing comes or goes, and nobody is told."""
        ip("link", "set", f"v{self.tag[:4]}{self.machines[name].address.split('.')[-1]}a", "down")

    def alive(self, name: str) -> bool:
        return name in self.machines and self.machines[name].process.poll() is None
