"""The image's first process, in a machine of its own: SSH with the given key alone, and its environment there."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.deploy.namespaces import HOME, Machines, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


def ssh(key: Path, address: str, command: str, user: str = "root") -> subprocess.CompletedProcess[str]:
    options = [
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "IdentitiesOnly=yes",
        "-o",
        "BatchMode=yes",
    ]
    line = ["ssh", "-p", "2222", "-i", str(key), *options, f"{user}@{address}", f"bash --login -c -i '{command}'"]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=30)


def test_a_pod_is_entered_with_its_key_and_knows_its_environment(tmp_path: Path) -> None:
    for name in ("key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    env = {
        "PUBLIC_KEY": (tmp_path / "key.pub").read_text(),
        "RUNPOD_POD_ID": "one",
        "WANDB_API_KEY": "planted value's",
        "RAY_AUTH_TOKEN": "",
        "GOOGLE_CREDENTIALS_JSON": '{"private_key": "planted"}',
    }
    machines = Machines(tmp_path / "machines")
    with machines.up():
        address = machines.start("one", env)
        asked = 'echo "$WANDB_API_KEY"; echo "${RAY_AUTH_TOKEN-unset}"; cat $GOOGLE_APPLICATION_CREDENTIALS; echo'
        deadline = time.monotonic() + 20
        while (answer := ssh(tmp_path / "key", address, asked)).returncode == 255 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert answer.stdout.splitlines() == ["planted value's", "unset", '{"private_key": "planted"}'], answer.stderr
        node = ssh(
            tmp_path / "key",
            address,
            f". {HOME}/deploy/node.sh; echo $NODE_IP $GLOO_SOCKET_IFNAME; ip link show $NCCL_SOCKET_IFNAME",
        )
        assert node.stdout.startswith(f"{address} v"), node.stderr
        modes = ssh(
            tmp_path / "key", address, "stat -c %a ~/.node_environment ~/.ssh/authorized_keys $GOOGLE_APPLICATION_CREDENTIALS"
        )
        assert set(modes.stdout.split()) == {"600"}
        assert machines.machines["one"].run(". deploy/node.sh; echo $NODE_IP").stdout.strip() == address
        assert "Permission denied (publickey)" in ssh(tmp_path / "other", address, "true").stderr
    assert not list(Path("/etc/netns").glob(f"mo{machines.tag}*"))
    assert "planted" not in (tmp_path / "machines" / "one" / "log").read_text()


def test_the_images_user_may_run_it() -> None:
    """sshd without root: that user alone can log in, and nobody else."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        machines = Machines(folder / "machines", uid=1000)
        reads = ["setpriv", "--reuid", "1000", "--clear-groups", "test", "-r", str(HOME / "deploy" / "entrypoint.sh")]
        if subprocess.run(reads, check=False).returncode:
            pytest.skip(f"{HOME} is closed to other users")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
        with machines.up():
            address = machines.start("one", {"PUBLIC_KEY": (folder / "key.pub").read_text(), "WANDB_API_KEY": "planted"})
            deadline = time.monotonic() + 20
            asked = 'id -u; echo "$WANDB_API_KEY"; stat -c %a ~/.node_environment'
            while (answer := ssh(folder / "key", address, asked, "ray")).returncode == 255 and time.monotonic() < deadline:
                time.sleep(0.2)
            assert answer.stdout.splitlines() == ["1000", "planted", "600"], answer.stderr
            assert "Permission denied (publickey)" in ssh(folder / "key", address, "true", "root").stderr


def test_it_becomes_what_it_is_told() -> None:
    command = ["bash", str(HOME / "deploy" / "entrypoint.sh"), "sh", "-c", "echo $$; ps -o ppid= $$ >/dev/null; echo done"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere"})
    assert told.stdout.endswith("done\n")
