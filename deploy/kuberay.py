"""deploy/gke: KubeRay's objects and what they need, for one namespace on GKE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deploy.redis import redis
from deploy.served import on_gpus
from momalisa.config import Cluster, Settings

RAY_VERSION = "2.60.0"
APP = {"app.kubernetes.io/part-of": "momalisa"}
SECRET = "momalisa-secrets"  # noqa: S105  # its name
SERVICE_ACCOUNT = "momalisa"
STAGES = ("collect", "caption", "encode", "train", "promote", "pipeline")
IMAGE_HOME = "/opt/momalisa"
NOTICE_S = 25  # a spot node has 30 s from its notice
CONTROL_PORTS = (6379, 8265, 8076, 10001, 52365)  # GCS, dashboard and jobs, object manager, client, agent
Object = dict[str, Any]


def documents(settings: Settings, config: str, home: Path) -> dict[str, list[Object]]:
    """{file below deploy/gke: its documents}."""
    cluster = settings.cluster
    base = {
        "serviceaccount.yaml": [service_account(cluster)],
        "redis.yaml": redis(SECRET, APP),
        "networkpolicy.yaml": network_policies(),
        "disruption.yaml": budgets(),
        "raycluster.yaml": [named("RayCluster", cluster.name, cluster_spec(cluster))],
        "rayservice.yaml": [ray_service(settings, config, home)],
    }
    jobs = {f"jobs/{stage}.yaml": [ray_job(settings, stage, config, home)] for stage in STAGES}
    overlays = {f"overlays/{name}/kustomization.yaml": [overlay(cluster, name)] for name in ("dev", "prod")}
    listing = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": sorted(base)}
    return {f"base/{name}": found for name, found in base.items()} | {"base/kustomization.yaml": [listing]} | jobs | overlays


def named(kind: str, name: str, spec: Object, api: str = "ray.io/v1", annotations: Object | None = None) -> Object:
    metadata: Object = {"name": name, "labels": APP} | ({"annotations": annotations} if annotations else {})
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}


def cluster_spec(cluster: Cluster) -> Object:
    """A CPU head that survives its own death (its state is in Redis), and spot GPU workers that come and go by demand."""
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},  # KubeRay makes the token, a Secret named after the cluster
        "tlsOptions": {"enabled": cluster.tls},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": 60 * cluster.idle_minutes,
            "upscalingMode": "Default",
            "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
        },
        "gcsFaultToleranceOptions": {
            "redisAddress": "redis:6379",
            "redisPassword": {"valueFrom": {"secretKeyRef": {"name": SECRET, "key": "REDIS_PASSWORD"}}},
        },
        "headGroupSpec": {
            # Autoscaled heads take no work; the dashboard listens for KubeRay, behind the token and the NetworkPolicy.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104
            "template": pod(cluster, "ray-head", {"cpu": "2", "memory": "8Gi"}),
        },
        "workerGroupSpecs": [worker_group(cluster)],
    }


def worker_group(cluster: Cluster) -> Object:
    gpu = cluster.gpus[0]
    size = {
        "cpu": str(cluster.cpus_per_node),
        "memory": f"{cluster.memory_gb_per_node}Gi",
        "nvidia.com/gpu": str(cluster.gpus_per_node),
    }
    template = pod(cluster, "ray-worker", size)
    # A spot node's notice: training writes a checkpoint of its step and goes on elsewhere.
    drain = {"exec": {"command": ["python", "-m", "deploy.drain", "--within-s", str(NOTICE_S - 5), "--wait"]}}
    template["spec"]["containers"][0]["lifecycle"] = {"preStop": drain}
    template["spec"] |= {
        "nodeSelector": {"cloud.google.com/gke-spot": "true", "cloud.google.com/gke-accelerator": gpu.gke},
        "tolerations": [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
        ],
        "terminationGracePeriodSeconds": NOTICE_S,
    }
    return {
        "groupName": "gpu",
        "minReplicas": cluster.min_workers,
        "replicas": cluster.min_workers,
        "maxReplicas": cluster.max_workers,
        "rayStartParams": {},
        "template": template,
    }


def pod(cluster: Cluster, name: str, size: dict[str, str]) -> Object:
    """One Ray container: not root, no privileges, secrets by reference."""
    limits = {key: value for key, value in size.items() if key != "cpu"}
    return {
        "metadata": {"labels": APP},
        "spec": {
            "serviceAccountName": SERVICE_ACCOUNT,
            "automountServiceAccountToken": name == "ray-head",  # the autoscaler beside the head asks Kubernetes for pods
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
            "containers": [
                {
                    "name": name,
                    "image": cluster.image,
                    "env": [{"name": key, "value": value} for key, value in environment(cluster).items()]
                    + [{"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": SECRET, "key": "WANDB_API_KEY"}}}],
                    "resources": {"requests": size, "limits": limits},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108
                }
            ],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}}],
        },
    }


def environment(cluster: Cluster) -> dict[str, str]:
    """Of every container; KubeRay sets RAY_AUTH_MODE and the token itself."""
    own = {key: value for key, value in cluster.environment.items() if key != "RAY_AUTH_MODE"}
    return own | {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}


def ray_job(settings: Settings, stage: str, config: str, home: Path) -> Object:
    """A stage on nodes of its own, which go when it ends. Applied again it goes on where it stopped."""
    carried = yaml.safe_load((home / "runtime_env.yaml").read_text())
    spec = {
        "entrypoint": f"python -m ray_jobs.{stage} --config {IMAGE_HOME}/{config}",
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": carried["env_vars"]}),  # the code is in the image
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "backoffLimit": 2,
        "submitterConfig": {"backoffLimit": 0},
        "activeDeadlineSeconds": 24 * 3600,
        "rayClusterSpec": {
            key: value for key, value in cluster_spec(settings.cluster).items() if key != "gcsFaultToleranceOptions"
        },
    }
    return named("RayJob", f"{settings.cluster.name}-{stage}", spec)


def ray_service(settings: Settings, config: str, home: Path) -> Object:
    """The endpoint. A new image or cluster is brought up beside the old one, and traffic moves over in steps."""
    served = on_gpus(settings, config, home)
    served["proxy_location"] = "EveryNode"
    served["http_options"]["host"] = "0.0.0.0"  # noqa: S104  # inside the cluster; the gateway is in front
    spec = {
        "serveConfigV2": yaml.safe_dump(served, sort_keys=False),
        "upgradeStrategy": {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {
                "gatewayClassName": "gke-l7-rilb",
                "stepSizePercent": 20,
                "intervalSeconds": 30,
                "maxSurgePercent": 100,
            },
        },
        "serviceUnhealthySecondThreshold": 900,
        "deploymentUnhealthySecondThreshold": 300,
        "rayClusterConfig": cluster_spec(settings.cluster),
    }
    return named("RayService", f"{settings.cluster.name}-serve", spec)


def service_account(cluster: Cluster) -> Object:
    """Workload Identity: pods are this Google account, and no key is anywhere."""
    account = f"{SERVICE_ACCOUNT}@{cluster.gcp_project}.iam.gserviceaccount.com"
    metadata = {"name": SERVICE_ACCOUNT, "labels": APP, "annotations": {"iam.gke.io/gcp-service-account": account}}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}


def network_policies() -> list[Object]:
    """Nothing comes in but: Ray to Ray, the operator to the head's control ports, the gateway to Serve, Ray to Redis."""
    ray = {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]}
    operator = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    gateway = {"ipBlock": {"cidr": "10.0.0.0/8"}}  # the proxy-only subnet and health checks of an internal load balancer
    checks = [{"ipBlock": {"cidr": cidr}} for cidr in ("35.191.0.0/16", "130.211.0.0/22")]
    rules = [
        {"from": [{"podSelector": ray}]},
        {"from": [{"podSelector": {"matchLabels": {"app.kubernetes.io/created-by": "kuberay-operator"}}}], "ports": [tcp(8265)]},
        {"from": [{"namespaceSelector": {}, "podSelector": operator}], "ports": [tcp(8265), tcp(52365), tcp(8000)]},
        {"from": [gateway, *checks], "ports": [tcp(8000)]},
    ]
    redis_rule = {"from": [{"podSelector": ray}], "ports": [tcp(6379)]}
    return [
        policy("deny-all", {"podSelector": {}, "policyTypes": ["Ingress"]}),
        policy("ray", {"podSelector": ray, "policyTypes": ["Ingress"], "ingress": rules}),
        policy("redis", {"podSelector": {"matchLabels": {"app": "redis"}}, "policyTypes": ["Ingress"], "ingress": [redis_rule]}),
    ]


def policy(name: str, spec: Object) -> Object:
    return named("NetworkPolicy", name, spec, api="networking.k8s.io/v1")


def tcp(port: int) -> Object:
    return {"protocol": "TCP", "port": port}


def budgets() -> list[Object]:
    """A drained machine never takes the head, and one serving worker at a time."""
    head = {"maxUnavailable": 0, "selector": {"matchLabels": {"ray.io/node-type": "head"}}}
    workers = {"maxUnavailable": 1, "selector": {"matchLabels": {"ray.io/node-type": "worker"}}}
    return [named("PodDisruptionBudget", f"ray-{name}", spec, api="policy/v1") for name, spec in
            (("head", head), ("workers", workers))]  # fmt: skip


def overlay(cluster: Cluster, name: str) -> Object:
    """dev: one worker at most. prod: as the settings say, and one worker always there to serve."""
    most, least = (1, 0) if name == "dev" else (cluster.max_workers, max(cluster.min_workers, 1))
    changes = {"RayCluster": ("/spec", cluster.name, cluster.min_workers),
               "RayService": ("/spec/rayClusterConfig", f"{cluster.name}-serve", least)}  # fmt: skip
    patches = []
    for kind, (where, target, fewest) in changes.items():
        group = f"{where}/workerGroupSpecs/0"
        fewest = min(fewest, most)
        operations = [
            {"op": "replace", "path": f"{group}/maxReplicas", "value": most},
            {"op": "replace", "path": f"{group}/minReplicas", "value": fewest},
            {"op": "replace", "path": f"{group}/replicas", "value": fewest},
        ]
        patches.append({"target": {"kind": kind, "name": target}, "patch": yaml.safe_dump(operations, sort_keys=False)})
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": f"momalisa-{name}",
        "resources": ["../../base"],
        "patches": patches,
    }
