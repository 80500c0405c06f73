"""deploy/gke.sh against recorded gcloud, kubectl and helm: what it makes, what it refuses before that, and no secret told."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.manifests import rendered
from momalisa.config import from_file
from tests.deploy.namespaces import HOME

RECORDER = r"""#!/bin/bash
echo "$(basename $0) $*" >> "$RECORD"
case "$(basename $0) $*" in
  *"$FAILS"*) exit 1 ;;
  "gcloud projects describe mine"*) echo 111 ;;
  "gcloud projects describe"*) exit 1 ;;
  "gcloud storage buckets describe gs://theirs"*) echo 222 ;;
  "gcloud storage buckets describe gs://ours"*) echo 111 ;;
  "gcloud storage buckets create gs://somebody"*) exit 1 ;;
  "gcloud container clusters describe taken"*"value(resourceLabels.app)"*) echo web ;;
  "gcloud container clusters describe taken"*) ;;
  "gcloud container clusters describe standing"*"value(resourceLabels.app)"*) echo momalisa ;;
  *" describe "*standing*) ;;
  "gcloud compute regions describe"*)
    echo "PREEMPTIBLE_NVIDIA_A100_80GB_GPUS,${A100S-16.0},1.0"; echo PREEMPTIBLE_NVIDIA_L4_GPUS,8.0,0.0 ;;
  "gcloud compute accelerator-types list"*) printf '%b' "${ZONES-us-central1-a\nus-central1-c\n}" ;;
  "kubectl -n"*"create secret"*) cat > "$RECORD.secret" ;;
  "kubectl get namespace momalisa-dev") [ -n "${STANDING-}" ] ;;
  *describe*|*"get namespace"*|*"get secret"*) exit 1 ;;
esac
"""
SETTINGS = {"root": "gs://new/moma", "cluster.gcp_project": "mine", "cluster.image": "registry/momalisa:1"}


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    for tool in ("gcloud", "kubectl", "helm"):
        (tmp_path / tool).write_text(RECORDER)
        (tmp_path / tool).chmod(0o755)
    return tmp_path


def run(
    tools: Path, *arguments: str, settings: dict[str, str] | None = None, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script beside what `deploy.manifests` writes for sd14.yaml with SETTINGS and these."""
    record, here = tools / "record", tools / "deploy"
    overrides = [f"--{name}={value}" for name, value in {**SETTINGS, **(settings or {})}.items()]
    for path, text in rendered(from_file(str(HOME / "configs" / "sd14.yaml"), overrides), "configs/sd14.yaml").items():
        (tools / path).parent.mkdir(parents=True, exist_ok=True)
        (tools / path).write_text(text)
    shutil.copy(HOME / "deploy" / "gke.sh", here)
    variables = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "HOME": os.environ["HOME"],
        "RECORD": str(record),
        "FAILS": "nothing",
        **environment,
    }
    script = ["bash", str(here / "gke.sh"), *arguments]
    done = subprocess.run(script, env=variables, capture_output=True, text=True, check=False)
    return done, record.read_text().splitlines() if record.exists() else []


def made(asked: list[str]) -> list[str]:
    return [line for line in asked if any(verb in f"{line} " for verb in (" create ", " apply ", "upgrade", " delete "))]


def in_order(asked: list[str], steps: list[str]) -> list[str]:
    """The line of each step; they must come one after the other."""
    lines = []
    for step in steps:
        found = next((index for index, line in enumerate(asked) if step in line), None)
        assert found is not None, (step, asked)
        lines.append(asked[found])
        asked = asked[found + 1 :]
    return lines


def test_everything_is_made_and_no_secret_is_in_a_command_line(tools: Path) -> None:
    done, asked = run(tools, WANDB_API_KEY="planted-wandb-key")
    assert done.returncode == 0, done.stderr
    steps = [
        "buckets create gs://new",
        "routers create momalisa-router",
        "routers nats create nat --router momalisa-router",
        "subnets create momalisa-proxies",
        "clusters create momalisa",
        "node-pools create cpu",
        "node-pools create gpu",
        "service-accounts create momalisa",
        "helm upgrade --install kuberay-operator",
        "create namespace momalisa-dev",
        "create secret generic momalisa-secrets",
        "kubectl apply -k",
    ]
    lines = dict(zip(steps, in_order(asked, steps), strict=True))
    assert "--purpose REGIONAL_MANAGED_PROXY --role ACTIVE" in lines["subnets create momalisa-proxies"]
    gpu = lines["node-pools create gpu"]
    assert "--machine-type a2-ultragpu-1g --accelerator type=nvidia-a100-80gb,count=1," in gpu
    assert "--spot --node-locations us-central1-a,us-central1-c" in gpu
    assert "--total-max-nodes 4" in gpu
    assert "--version 1.7.0 " in lines["helm upgrade --install kuberay-operator"]
    assert not any("RayClusterMTLS" in line or "cert-manager" in line for line in asked)
    assert any("roles/iam.workloadIdentityUser" in line and "momalisa-dev/momalisa]" in line for line in asked)
    secret = (tools / "record.secret").read_text()
    assert "WANDB_API_KEY=planted-wandb-key" in secret
    assert len(next(line for line in secret.splitlines() if line.startswith("REDIS_PASSWORD=")).split("=")[1]) >= 32
    assert "planted" not in "\n".join(asked) + done.stdout + done.stderr
    assert secret.splitlines()[0].split("=")[1] not in "\n".join(asked)


def test_another_gpu_in_the_settings_is_another_node_pool(tools: Path) -> None:
    gpu = """[{"runpod": "L4", "gke": "nvidia-l4", "gke_machines": {"2": "g2-standard-24"}, "memory_gb": 24, "tflops": 121,
      "gke_quota": "PREEMPTIBLE_NVIDIA_L4_GPUS", "runpod_usd_per_hour": 1, "gke_usd_per_hour": 1}]"""
    changes = {
        "cluster.gpus": gpu,
        "cluster.gpus_per_node": "2",
        "cluster.max_workers": "3",
        "cluster.gcp_region": "europe-west4",
    }
    done, asked = run(tools, settings=changes)
    assert done.returncode == 0, done.stderr
    (line,) = in_order(asked, ["node-pools create gpu"])
    for part in ("--machine-type g2-standard-24 ", "type=nvidia-l4,count=2,", "--total-max-nodes 3", "--region europe-west4"):
        assert part in line


def test_an_existing_bucket_is_used(tools: Path) -> None:
    done, asked = run(tools, settings={"root": "gs://ours/moma"}, OVERLAY="prod")
    assert done.returncode == 0
    assert not any("buckets create" in line for line in asked)
    assert any("overlays/prod" in line for line in asked)


def test_what_stands_is_not_made_again(tools: Path) -> None:
    done, asked = run(tools, settings={"root": "gs://ours/moma", "cluster.name": "standing"}, STANDING="yes")
    assert done.returncode == 0, done.stderr
    assert not any(" create " in line and "service-accounts" not in line and "kubectl" not in line for line in asked)
    assert not any("regions describe" in line for line in asked)  # its own GPUs may use all of the quota


def test_tls_brings_cert_manager_and_the_operators_gate(tools: Path) -> None:
    done, asked = run(tools, settings={"cluster.tls": "true"})
    assert done.returncode == 0, done.stderr
    certificates, operator = in_order(asked, ["helm upgrade --install cert-manager", "helm upgrade --install kuberay-operator"])
    assert "--version v1.19.4" in certificates
    assert "featureGates[1].name=RayClusterMTLS --set featureGates[1].enabled=true" in operator


@pytest.mark.parametrize(
    ("settings", "environment", "said"),
    [
        ({"cluster.gcp_project": "YOUR-PROJECT"}, {}, "PROJECT=YOUR-PROJECT is an example"),
        ({"cluster.image": "ghcr.io/YOUR-ORG/momalisa:0.1.0"}, {}, "IMAGE=ghcr.io/YOUR-ORG/momalisa:0.1.0 is an example"),
        ({"root": "out/demo"}, {}, "has no BUCKET: `root` of your settings must be gs://BUCKET/..."),
        ({}, {"BUCKET": "other"}, "BUCKET=other, but deploy/gke/cluster.env says BUCKET=new; change your settings"),
        ({"cluster.gcp_project": "nobodys"}, {}, "no project nobodys"),
        ({"root": "gs://theirs/moma"}, {}, "gs://theirs belongs to project 222, not to mine (111)"),
        ({"root": "gs://somebody"}, {}, "the name is taken by somebody else's project"),
        ({"cluster.name": "taken"}, {}, "cluster name taken is taken in us-central1"),
        ({}, {"OVERLAY": "test"}, "OVERLAY=test is neither dev nor prod"),
        ({}, {"A100S": "1.0"}, "the quota PREEMPTIBLE_NVIDIA_A100_80GB_GPUS of mine in us-central1 has 0 left, a node needs 1"),
        ({}, {"ZONES": ""}, "no zone of us-central1 has nvidia-a100-80gb"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(
    tools: Path, settings: dict[str, str], environment: dict[str, str], said: str
) -> None:
    done, asked = run(tools, settings=settings, **environment)
    assert done.returncode == 1
    assert said in done.stderr
    assert [line for line in made(asked) if "buckets create gs://somebody" not in line] == []
    assert "what stands" not in done.stderr


def test_a_quota_for_some_of_the_nodes_is_said(tools: Path) -> None:
    done, _ = run(tools, A100S="3.0")
    assert done.returncode == 0
    assert "PREEMPTIBLE_NVIDIA_A100_80GB_GPUS is enough for 2 of 4 nodes" in done.stderr


def test_a_later_failure_says_what_stands_and_how_to_delete_it(tools: Path) -> None:
    done, asked = run(tools, FAILS="node-pools create gpu")
    assert done.returncode == 1
    for part in ("gs://new", "router momalisa-router with its NAT", "subnet momalisa-proxies", "cluster momalisa in us-central1"):
        assert part in done.stderr.split("what stands may be billed:")[1]
    assert "`make gke-down` deletes all but the bucket" in done.stderr
    assert not any("kubectl" in line or "helm" in line for line in asked)


def test_all_but_the_bucket_goes(tools: Path) -> None:
    done, asked = run(tools, "down", settings={"cluster.name": "standing"}, STANDING="yes")
    assert done.returncode == 0, done.stderr
    in_order(
        asked,
        [
            "kubectl -n momalisa-dev delete rayservice,rayjob,raycluster --all",
            "kubectl delete namespace momalisa-dev",
            "clusters delete standing",
            "routers delete standing-router",
            "subnets delete standing-proxies",
        ],
    )
    assert not any("gs://" in line or " create " in line for line in asked)


def test_nothing_is_deleted_that_is_another_applications(tools: Path) -> None:
    done, asked = run(tools, "down", settings={"cluster.name": "taken"})
    assert (done.returncode, made(asked)) == (1, [])
