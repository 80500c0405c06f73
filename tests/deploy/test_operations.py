"""docs/operations.md: every command in its blocks is run by a test that is named here, or says that it needs the cloud."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.namespaces import HOME

TEXT = (HOME / "docs" / "operations.md").read_text()
RUN_BY = {  # the beginning of a command: the test that runs it, and what of it stands there
    "ssh-keygen": ("test_ray_up.py", '"ssh-keygen"'),
    "export RUNPOD_API_KEY": ("test_ray_up.py", '"RUNPOD_API_KEY": KEY'),
    "export RAY_AUTH_MODE": ("test_submit.py", '"RAY_AUTH_TOKEN": TOKEN'),
    "make plan": ("../test_cost.py", '"ray_jobs.plan"'),
    "ray up": ("test_ray_up.py", 'laptop("up"'),
    "ray dashboard": ("test_ray_up.py", '"dashboard"'),
    "make submit": ("test_submit.py", '"deploy.submit"'),
    "python -m deploy.runpod ls": ("test_node_provider.py", 'command("ls")'),
    "ray down": ("test_ray_up.py", 'laptop("down"'),
    "make manifests": ("test_manifests.py", '"deploy.manifests"'),
    "make gke": ("test_gke_script.py", '"gke.sh"'),
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_there_are_ten_for_each_cloud() -> None:
    numbers = [int(found) for found in re.findall(r"# (\d+)\b", "\n".join(commands()))]
    assert numbers == [*range(1, 11), *range(1, 11)]


@pytest.mark.parametrize("line", commands())
def test_a_command_is_run_by_a_test_or_needs_the_cloud(line: str) -> None:
    if "[cloud]" in line:
        return
    test, part = next(found for begin, found in RUN_BY.items() if line.startswith(begin))
    assert part in (Path(__file__).parent / test).read_text()


def test_the_make_targets_are_there() -> None:
    makefile = (HOME / "Makefile").read_text()
    for target in set(re.findall(r"make ((?:[a-z-]+ ?)+)", "\n".join(commands()))):
        for name in target.split():
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_the_files_are_there() -> None:
    for name in re.findall(r"`((?:deploy|momalisa|tests)/[\w./]+\.\w+)`", TEXT):
        assert (HOME / name).exists(), name
