"""cluster.yaml, serve/runpod.yaml and deploy/gke: they say what the settings say, and Ray, KubeRay and Kubernetes accept them."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import kuberay
from deploy.manifests import rendered
from momalisa.config import ConfigError, from_file
from tests.deploy.namespaces import BIN

HOME = Path(__file__).parents[2]
GKE = HOME / "deploy" / "gke"
SCHEMAS = Path(os.environ.get("MOMALISA_SHARED", "../shared")) / "schemas"
CONFIG = "configs/sd14.yaml"
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(path.read_text(), Loader=Loader) if document]


OBJECTS = [
    pytest.param(document, id=f"{path.relative_to(GKE)}:{document['kind']}")
    for path in sorted([*(GKE / "base").glob("*.yaml"), *(GKE / "jobs").glob("*.yaml")])
    for document in load(path)
    if document["kind"] != "Kustomization"
]


def overlay(name: str) -> list[dict[str, Any]]:
    """What `kustomize build` makes of an overlay: only what ours use (resources, namespace, JSON patches by target)."""
    folder = GKE / "overlays" / name
    (recipe,) = load(folder / "kustomization.yaml")
    assert set(recipe) == {"apiVersion", "kind", "namespace", "resources", "patches"}
    base = folder / recipe["resources"][0]
    objects = [copy.deepcopy(item) for file in load(base / "kustomization.yaml")[0]["resources"] for item in load(base / file)]
    for item in objects:
        item["metadata"]["namespace"] = recipe["namespace"]
    for patch in recipe["patches"]:
        (target,) = [item for item in objects if (item["kind"], item["metadata"]["name"]) == tuple(patch["target"].values())]
        for operation in yaml.safe_load(patch["patch"]):
            *path, last = operation["path"].strip("/").split("/")
            place = functools.reduce(lambda found, step: found[int(step) if step.isdigit() else step], path, target)
            assert (operation["op"], last in place) == ("replace", True)
            place[last] = operation["value"]
    return objects


def everything() -> Iterator[dict[str, Any]]:
    yield from (parameter.values[0] for parameter in OBJECTS)
    for name in ("dev", "prod"):
        yield from overlay(name)


def test_the_files_are_what_the_settings_say() -> None:
    made = rendered(from_file(str(HOME / CONFIG)), CONFIG)
    for path, text in made.items():
        assert (HOME / path).read_text() == text, f"{path}: run `make manifests`"
    assert {path for path in made if path.parts[0] == "deploy"} == {file.relative_to(HOME) for file in GKE.rglob("*.*")}


def test_a_changed_setting_changes_both_clouds() -> None:
    before, after = (
        rendered(from_file(str(HOME / CONFIG), changes), CONFIG)
        for changes in ([], ["--cluster.max_workers=7", "--cluster.image=x:2"])
    )
    changed = {str(path) for path in before if before[path] != after[path]}
    assert {
        "cluster.yaml",
        "deploy/gke/cluster.env",
        "serve/runpod.yaml",
        "deploy/gke/base/raycluster.yaml",
        "deploy/gke/jobs/train.yaml",
        "deploy/gke/base/rayservice.yaml",
    } <= changed


@functools.cache
def crd(kind: str) -> Any:
    (document,) = load(SCHEMAS / f"ray.io_{kind.lower()}s.crd.yaml")
    schema = next(version for version in document["spec"]["versions"] if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    close(schema)
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema)


def close(schema: Any) -> None:
    """Kubernetes drops unknown fields silently: here they are errors."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        for value in list(schema.values()):
            close(value)
    elif isinstance(schema, list):
        for value in schema:
            close(value)


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"KubeRay's CRDs are not at {SCHEMAS}")
def test_kuberay_knows_every_field() -> None:
    found = [item for item in everything() if item["apiVersion"] == "ray.io/v1"]
    assert {item["kind"] for item in found} == {"RayCluster", "RayJob", "RayService"}
    for item in found:
        plain = {key: value for key, value in item.items() if key != "metadata"} | {"metadata": {}}
        errors = [f"{error.json_path}: {error.message}" for error in crd(item["kind"]).iter_errors(plain)]
        assert not errors, (item["metadata"]["name"], errors)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kubernetes_knows_every_field() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    found = [item for item in everything() if item["apiVersion"] != "ray.io/v1"]
    assert {"ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "StatefulSet", "Service"} == {
        item["kind"] for item in found
    }
    templates = [group["template"] for item in everything() if item["kind"] == "RayCluster" for group in groups(item["spec"])]
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]} for template in templates]
    for item in [*found, *pods]:
        kubernetes_validate.validate(item, "1.33", strict=True)


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def spec_of(item: dict[str, Any]) -> dict[str, Any] | None:
    return {
        "RayCluster": lambda spec: spec,
        "RayJob": lambda spec: spec["rayClusterSpec"],
        "RayService": lambda spec: spec["rayClusterConfig"],
    }.get(item["kind"], lambda spec: None)(item.get("spec"))


def test_every_cluster_is_locked_down() -> None:
    specs = [spec for item in everything() if (spec := spec_of(item))]
    assert len(specs) > 8
    for spec in specs:
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["enableInTreeAutoscaling"] is True
        for group in groups(spec):
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert not pod.get("hostNetwork")
            (container,) = pod["containers"]
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            names = {entry["name"]: entry for entry in container["env"]}
            assert "RAY_health_check_period_ms" in names
            assert all("valueFrom" in entry for name, entry in names.items() if re.search("KEY|TOKEN|PASSWORD|SECRET", name))


def test_control_ports_are_open_to_ray_and_the_operator_alone() -> None:
    policies = {item["metadata"]["name"]: item["spec"] for item in load(GKE / "base" / "networkpolicy.yaml")}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for rule in policies["ray"]["ingress"]:
        ports = {port["port"] for port in rule.get("ports", [])}
        outside = any("ipBlock" in source for source in rule["from"])
        assert not outside or ports == {8000}
        assert ports or rule["from"] == [{"podSelector": policies["ray"]["podSelector"]}]
    assert not any(
        port["port"] in kuberay.CONTROL_PORTS
        for rule in policies["ray"]["ingress"]
        for port in rule.get("ports", [])
        if any("ipBlock" in source for source in rule["from"])
    )


def test_the_overlays() -> None:
    sizes = {}
    for name in ("dev", "prod"):
        found = {item["kind"]: item for item in overlay(name)}
        assert {item["metadata"]["namespace"] for item in overlay(name)} == {f"momalisa-{name}"}
        group = found["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
        sizes[name] = group["minReplicas"], group["maxReplicas"]
    assert sizes == {"dev": (0, 1), "prod": (1, 4)}


def test_what_serve_is_given_is_accepted_by_ray() -> None:
    from ray.serve.schema import ServeDeploySchema

    committed = ServeDeploySchema(**yaml.safe_load((HOME / "serve" / "config.yaml").read_text()))
    (service,) = load(GKE / "base" / "rayservice.yaml")
    (runpod,) = load(HOME / "serve" / "runpod.yaml")
    for given in (yaml.safe_load(service["spec"]["serveConfigV2"]), runpod):
        made = ServeDeploySchema(**given)
        assert made.applications[0].import_path == committed.applications[0].import_path
        assert [item.name for item in made.applications[0].deployments] == [
            item.name for item in committed.applications[0].deployments
        ]
        assert made.applications[0].args["config"] == CONFIG
        generator = made.applications[0].deployments[1]
        assert generator.ray_actor_options.num_gpus == 1
        assert generator.autoscaling_config["max_replicas"] == 4
    assert runpod["http_options"]["host"] == "127.0.0.1", "its ports are reached by an SSH tunnel alone"
    assert service["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"


def test_jobs_run_what_the_image_holds_with_the_environment_that_submitted_ones_get() -> None:
    from ray.runtime_env import RuntimeEnv

    carried = yaml.safe_load((HOME / "runtime_env.yaml").read_text())
    assert {path.stem for path in (GKE / "jobs").glob("*.yaml")} == set(kuberay.STAGES)
    for stage in kuberay.STAGES:
        (job,) = load(GKE / "jobs" / f"{stage}.yaml")
        found = re.fullmatch(r"python -m (ray_jobs\.\w+) --config /opt/momalisa/(.*)", job["spec"]["entrypoint"])
        assert found
        assert (HOME / (found[1].replace(".", "/") + ".py")).is_file()
        assert (HOME / found[2]).is_file()
        assert RuntimeEnv(**yaml.safe_load(job["spec"]["runtimeEnvYAML"]))["env_vars"] == carried["env_vars"]
        assert job["spec"]["shutdownAfterJobFinishes"] is True


def test_a_job_can_be_created_again_and_again_within_kuberays_length_of_names() -> None:
    longest = "m" * 32
    made = rendered(from_file(str(HOME / CONFIG), [f"--cluster.name={longest}"]), CONFIG)
    for stage in kuberay.STAGES:
        metadata = yaml.safe_load(made[Path(f"deploy/gke/jobs/{stage}.yaml")])["metadata"]
        assert "name" not in metadata
        assert metadata["generateName"] == f"{longest}-{stage}-"
        assert len(metadata["generateName"]) + 5 <= 47
    with pytest.raises(ConfigError, match=r"cluster\.name"):
        from_file(str(HOME / CONFIG), [f"--cluster.name={longest}m"])


def test_tls_is_said_to_kuberay_only_where_it_is_on_and_never_to_runpod() -> None:
    """KubeRay without the feature gate refuses a cluster that has the key at all."""
    assert not any("tlsOptions" in spec for item in everything() if (spec := spec_of(item)))
    made = rendered(from_file(str(HOME / CONFIG), ["--cluster.tls=true"]), CONFIG)
    for name in ("base/raycluster", "base/rayservice", "jobs/train"):
        spec = spec_of(yaml.safe_load(made[GKE.relative_to(HOME) / f"{name}.yaml"]))
        assert spec is not None
        assert spec["tlsOptions"] == {"enabled": True}
    assert Path("cluster.yaml") not in made


def test_budgets_are_of_the_kind_that_holds_for_pods_without_a_scale() -> None:
    for budget in load(GKE / "base" / "disruption.yaml"):
        assert set(budget["spec"]) == {"minAvailable", "selector"}, "a RayCluster has no scale subresource"
        assert budget["spec"]["minAvailable"] == 1


def test_shared_memory_is_left_to_kuberay_which_makes_it_as_large_as_the_memory() -> None:
    for spec in (spec for item in everything() if (spec := spec_of(item))):
        for group in groups(spec):
            assert "volumeMounts" not in group["template"]["spec"]["containers"][0]
            assert "volumes" not in group["template"]["spec"]


def test_what_asks_for_no_gpu_has_machines_without_one() -> None:
    for spec in (spec for item in everything() if (spec := spec_of(item))):
        gpu, cpu = spec["workerGroupSpecs"]
        asked, given = (group["template"]["spec"]["containers"][0]["resources"]["requests"] for group in (cpu, gpu))
        assert ("nvidia.com/gpu" in given, "nvidia.com/gpu" in asked) == (True, False)
        assert cpu["template"]["spec"]["nodeSelector"] == {"cloud.google.com/gke-nodepool": "cpu"}
        assert (cpu["minReplicas"], cpu["maxReplicas"]) == (0, 2)


def test_the_notice_fits_into_what_gke_gives() -> None:
    (cluster,) = load(GKE / "base" / "raycluster.yaml")
    template = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    command = template["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    within_s = int(command[command.index("--within-s") + 1])
    assert within_s + 5 <= template["terminationGracePeriodSeconds"] <= 15


def test_the_gateway_is_let_in_from_the_subnet_that_the_script_makes() -> None:
    (ray,) = (item["spec"] for item in load(GKE / "base" / "networkpolicy.yaml") if item["metadata"]["name"] == "ray")
    blocks = [source["ipBlock"]["cidr"] for rule in ray["ingress"] for source in rule["from"] if "ipBlock" in source]
    assert f"PROXY_RANGE={blocks[0]}\n" in (GKE / "cluster.env").read_text()


def test_gke_has_no_machine_with_three_gpus() -> None:
    with pytest.raises(ValueError, match=r"cluster.gpus_per_node=3 of nvidia-a100-80gb; try one of 1, 2, 4, 8"):
        rendered(from_file(str(HOME / CONFIG), ["--cluster.gpus_per_node=3"]), CONFIG)


def test_ray_accepts_cluster_yaml() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((HOME / "cluster.yaml").read_text())
    schema = json.loads((BIN.parent / "lib/python3.11/site-packages/ray/autoscaler/ray-schema.json").read_text())
    optional = {"docker", "metadata", "no_restart"}
    assert set(config) == set(schema["properties"]) - optional, "every key is spelled out: an external provider has no defaults"
    validate_config(prepare_config(config))
    assert config["provider"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


def test_check_names_the_file_that_drifted(tmp_path: Path) -> None:
    command = [str(BIN / "python"), "-m", "deploy.manifests", "--check", "--config"]
    assert subprocess.run([*command, CONFIG], cwd=HOME, check=False).returncode == 0
    drifted = subprocess.run([*command, "configs/demo.yaml"], cwd=HOME, capture_output=True, text=True, check=False)
    assert (drifted.returncode, "is not what configs/demo.yaml says; run `make manifests`" in drifted.stderr) == (1, True)
