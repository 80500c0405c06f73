"""deploy/gke.sh against recorded gcloud, kubectl and helm: what it makes, what it refuses before that, and no secret told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.namespaces import HOME

RECORDER = r"""#!/bin/bash
echo "$(basename $0) $*" >> "$RECORD"
case "$(basename $0) $*" in
  "gcloud projects describe mine"*) echo 111 ;;
  "gcloud projects describe"*) exit 1 ;;
  "gcloud storage buckets describe gs://theirs"*) echo 222 ;;
  "gcloud storage buckets describe gs://ours"*) echo 111 ;;
  "gcloud storage buckets create gs://somebody"*) exit 1 ;;
  "gcloud container clusters describe taken"*"value(resourceLabels.app)"*) echo web ;;
  "gcloud container clusters describe taken"*) ;;
  "gcloud container node-pools create gpu"*) [ "$GPU" != none-left ] ;;
  "kubectl -n"*"create secret"*) cat > "$RECORD.secret" ;;
  *describe*|*"get namespace"*|*"get secret"*) exit 1 ;;
esac
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    for tool in ("gcloud", "kubectl", "helm"):
        (tmp_path / tool).write_text(RECORDER)
        (tmp_path / tool).chmod(0o755)
    return tmp_path


def run(tools: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    record = tools / "record"
    variables = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": os.environ["HOME"], "RECORD": str(record), **environment}
    script = ["bash", str(HOME / "deploy" / "gke.sh")]
    done = subprocess.run(script, env=variables, capture_output=True, text=True, check=False)
    return done, record.read_text().splitlines() if record.exists() else []


def made(asked: list[str]) -> list[str]:
    return [line for line in asked if " create " in line or " apply " in line or "upgrade" in line]


def test_everything_is_made_and_no_secret_is_in_a_command_line(tools: Path) -> None:
    done, asked = run(tools, PROJECT="mine", BUCKET="new", WANDB_API_KEY="planted-wandb-key")
    assert done.returncode == 0, done.stderr
    order = [
        "buckets create gs://new",
        "clusters create momalisa",
        "node-pools create gpu",
        "service-accounts create momalisa",
        "helm upgrade",
        "create namespace momalisa-dev",
        "create secret generic momalisa-secrets",
        "kubectl apply -k",
    ]
    places = [next(index for index, line in enumerate(asked) if step in line) for step in order]
    assert places == sorted(places)
    assert "--spot" in asked[places[2]]
    assert any("roles/iam.workloadIdentityUser" in line and "momalisa-dev/momalisa]" in line for line in asked)
    secret = (tools / "record.secret").read_text()
    assert "WANDB_API_KEY=planted-wandb-key" in secret
    assert len(next(line for line in secret.splitlines() if line.startswith("REDIS_PASSWORD=")).split("=")[1]) >= 32
    assert "planted" not in "\n".join(asked) + done.stdout + done.stderr
    assert secret.splitlines()[0].split("=")[1] not in "\n".join(asked)


def test_an_existing_bucket_is_used(tools: Path) -> None:
    done, asked = run(tools, PROJECT="mine", BUCKET="ours", OVERLAY="prod")
    assert done.returncode == 0
    assert not any("buckets create" in line for line in asked)
    assert any("overlays/prod" in line for line in asked)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"BUCKET": "ours"}, "PROJECT is not set"),
        ({"PROJECT": "mine"}, "BUCKET is not set"),
        ({"PROJECT": "nobodys", "BUCKET": "ours"}, "no project nobodys"),
        ({"PROJECT": "mine", "BUCKET": "theirs"}, "gs://theirs belongs to project 222, not to mine (111)"),
        ({"PROJECT": "mine", "BUCKET": "somebody"}, "the name is taken by somebody else's project"),
        ({"PROJECT": "mine", "BUCKET": "ours", "CLUSTER": "taken"}, "cluster name taken is taken in us-central1"),
        ({"PROJECT": "mine", "BUCKET": "ours", "OVERLAY": "test"}, "OVERLAY=test is neither dev nor prod"),
    ],
)
def test_mistakes_are_found_before_anything_costs(tools: Path, environment: dict[str, str], said: str) -> None:
    done, asked = run(tools, **environment)
    assert done.returncode == 1
    assert said in done.stderr
    assert [line for line in made(asked) if "buckets create gs://somebody" not in line] == []


def test_no_quota(tools: Path) -> None:
    done, asked = run(tools, PROJECT="mine", BUCKET="ours", GPU="none-left")
    assert (done.returncode, "is the quota for none-left" in done.stderr) == (1, True)
    assert not any("kubectl" in line or "helm" in line for line in asked)
