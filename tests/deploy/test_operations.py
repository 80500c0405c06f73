"""docs/operations.md: every command in it is run by a test that is named here, or says that it needs the cloud."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.deploy.namespaces import BIN, HOME

TEXT = (HOME / "docs" / "operations.md").read_text()
RUN_BY = {  # the beginning of a command: the test that runs it, and what of it stands there
    "ssh-keygen": ("test_ray_up.py", '"ssh-keygen"'),
    "export RUNPOD_API_KEY": ("test_ray_up.py", '"RUNPOD_API_KEY": KEY'),
    "export RAY_AUTH_MODE": ("test_submit.py", '"RAY_AUTH_TOKEN": TOKEN'),
    "make cloud": ("test_once.py", "once.main()"),
    "make plan": ("../test_cost.py", '"ray_jobs.plan"'),
    "ray up": ("test_ray_up.py", 'laptop("up"'),
    "ray dashboard": ("test_ray_up.py", '"dashboard"'),
    "make submit": ("test_submit.py", '"deploy.submit"'),
    "ray job stop": ("test_submit.py", '"job", "stop"'),
    "ray status": ("test_ray_up.py", '"ray status"'),
    "python -m deploy.runpod ls": ("test_node_provider.py", 'command("ls")'),
    "python -m deploy.runpod gc": ("test_node_provider.py", 'command("gc"'),
    "python -m deploy.drain": ("../integration/test_multinode.py", "shlex.join(pre_stop())"),
    "pytest -m slow -s tests/integration/test_multinode.py": ("../integration/test_multinode.py", "pytest.mark.slow"),
    "openssl rand -hex 32": ("test_operations.py", '"rand", "-hex", "32"'),
    "make image-check": ("test_image.py", '"install.sh"'),
    "ray down": ("test_ray_up.py", 'laptop("down"'),
    "make manifests": ("test_manifests.py", '"deploy.manifests"'),
    "make gke": ("test_gke_script.py", '"gke.sh"'),
}


BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
PROGRAMS = r"(docker|gcloud|helm|kubectl|make|openssl|pytest|python|ray|serve|ssh-keygen|uv) "


def commands() -> list[str]:
    return [line for block in BLOCK.findall(TEXT) for line in block.splitlines() if line.strip()]


def commands_in_sentences() -> list[str]:
    spans = re.findall(r"`([^`]+`(?: \*\*\[cloud\])?)", BLOCK.sub("", TEXT))
    return sorted({" ".join(span.replace("`", "").split()) for span in spans if re.match(PROGRAMS, span)})


def test_there_are_ten_for_each_cloud() -> None:
    numbers = [int(found) for found in re.findall(r"# (\d+)\b", "\n".join(commands()))]
    assert numbers == [*range(1, 11), *range(1, 11)]


@pytest.mark.parametrize("line", [*commands(), *commands_in_sentences()])
def test_a_command_is_run_by_a_test_or_needs_the_cloud(line: str) -> None:
    if "[cloud]" in line:
        return
    test, part = next(found for begin, found in RUN_BY.items() if line.startswith(begin))
    assert part in (Path(__file__).parent / test).read_text()


def test_a_token_is_made() -> None:
    made = subprocess.run(["openssl", "rand", "-hex", "32"], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"[0-9a-f]{64}\n", made)


MAKE_LINES = sorted({line.split("#")[0].replace("[cloud]", "").strip() for line in [*commands(), *commands_in_sentences()]
                     if line.startswith("make ")})  # fmt: skip


@pytest.mark.parametrize("line", MAKE_LINES)
def test_a_make_line_comes_to_commands_that_exist(line: str) -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # this test may run below a make
    asked = [*line.split(), "-n", "-o", ".venv/.ready"]
    made = subprocess.run(asked, cwd=HOME, env=alone, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    expanded = [shlex.split(command) for command in made.stdout.replace("\\\n", " ").splitlines()]
    assert expanded, made.stderr
    for program, *arguments in expanded:
        if program == "bash":
            assert (HOME / arguments[0]).is_file()
        elif arguments[:1] == ["-m"]:
            module = HOME / arguments[1].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), line
        elif program != "uv":  # asks the package index
            assert program.startswith(".venv/bin/")
            assert (BIN / Path(program).name).is_file(), line


def test_the_files_are_there() -> None:
    for name in re.findall(r"`((?:deploy|momalisa|tests)/[\w./]+\.\w+)`", TEXT):
        assert (HOME / name).exists(), name
