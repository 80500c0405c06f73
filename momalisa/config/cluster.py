"""Settings of rented clusters: what `python -m deploy.manifests` makes cluster.yaml and deploy/gke from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from momalisa.config.section import Positive, Section

Usd = Annotated[float, Field(gt=0)]
PLACEHOLDER = "YOUR-"  # stands in values that everybody must edit


class Gpu(Section):
    """A kind of GPU as RunPod and GKE name it, and what it costs."""

    runpod: str
    """RunPod's id of it, as in GET /v2/catalog/gpus."""
    gke: str
    """GKE's accelerator label, `cloud.google.com/gke-accelerator`."""
    gke_machines: dict[int, str]
    """Compute Engine's machine types, by how many of it they have."""
    gke_quota: str
    """The regional quota that spot nodes with it use, as `gcloud compute regions describe` lists it."""
    memory_gb: Positive
    runpod_usd_per_hour: Usd
    """List price on demand; the pod's own `cost` is what the provider counts."""
    gke_usd_per_hour: Usd
    """The GPU and its share of the machine, spot."""
    tflops: Usd
    """Dense bf16 peak, for the stated model of speed."""


RTX_4090 = Gpu(
    runpod="NVIDIA GeForce RTX 4090",
    gke="nvidia-l4",
    gke_machines={1: "g2-standard-12", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"},
    gke_quota="PREEMPTIBLE_NVIDIA_L4_GPUS",
    memory_gb=24,
    runpod_usd_per_hour=0.69,
    gke_usd_per_hour=0.35,
    tflops=165,
)
A100 = Gpu(
    runpod="NVIDIA A100-SXM4-80GB",
    gke="nvidia-a100-80gb",
    gke_machines={count: f"a2-ultragpu-{count}g" for count in (1, 2, 4, 8)},
    gke_quota="PREEMPTIBLE_NVIDIA_A100_80GB_GPUS",
    memory_gb=80,
    runpod_usd_per_hour=1.49,
    gke_usd_per_hour=1.57,
    tflops=312,
)
H100 = Gpu(
    runpod="NVIDIA H100 80GB HBM3",
    gke="nvidia-h100-80gb",
    gke_machines={count: f"a3-highgpu-{count}g" for count in (1, 2, 4, 8)},
    gke_quota="PREEMPTIBLE_NVIDIA_H100_GPUS",
    memory_gb=80,
    runpod_usd_per_hour=2.99,
    gke_usd_per_hour=3.0,
    tflops=989,
)


class Cluster(Section):
    """A head and GPU workers. Prices and speeds are list figures of the day they were written: change them here."""

    name: str = Field(default="momalisa", pattern=r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$")
    image: str = "ghcr.io/YOUR-ORG/momalisa:0.1.0"
    gpus: tuple[Gpu, ...] = Field(default=(A100, H100), min_length=1)
    """In order of preference: without capacity for one the next is asked for."""
    regions: tuple[str, ...] = ()
    """RunPod's data centres in order of preference (default: any)."""
    head_gpu: Gpu = RTX_4090
    """RunPod's private network joins GPU pods only, so the head is one."""
    gpus_per_node: Positive = 1
    cpus_per_node: Positive = 8
    memory_gb_per_node: Positive = 32
    min_workers: Annotated[int, Field(ge=0)] = 0
    max_workers: Positive = 4
    max_cpu_workers: Positive = 2
    """On GKE: machines without a GPU, which come where a stage asks for none (collecting)."""
    idle_minutes: Positive = 10
    disk_gb: Positive = 80
    usd_per_hour_max: Usd = 10.0
    """No pod is rented that takes the cluster above this."""
    usd_total_max: Usd = 100.0
    """At this sum the provider gives every pod back, the head last."""
    tls: bool = False
    """Mutual TLS between the nodes of a GKE cluster (KubeRay and cert-manager); RunPod is refused, see SECURITY.md."""
    start_timeout_s: Annotated[int, Field(ge=1, lt=900)] = 840
    """A pod that does not run by then is given back (an image that cannot be pulled looks like this). Ray gives up at 900."""
    orphan_minutes: Positive = 15
    """A RunPod pod whose raylet ended so long ago gives itself back: its head died. One never set up has Ray's 900 s more."""
    secrets: tuple[str, ...] = ("RAY_AUTH_TOKEN", "WANDB_API_KEY", "GOOGLE_CREDENTIALS_JSON")
    """Names of secrets that nodes get, from RunPod's secret store. Values are never in a file."""
    head_secrets: tuple[str, ...] = ("RUNPOD_ACCOUNT_KEY",)
    """Those that only RunPod's head gets: the key it rents with. (RUNPOD_API_KEY is taken: each pod gets one for itself.)"""
    gcp_project: str = "YOUR-PROJECT"
    gcp_region: str = "us-central1"
    link_mbit_per_s: Usd = 100.0
    """Between RunPod pods, as documented."""
    gke_link_mbit_per_s: Usd = 16_000.0
    images_per_s_per_gpu: Usd | None = None
    """Measured training speed of one GPU, for `python -m ray_jobs.plan` (default: a stated model)."""
    train_start_timeout_s: Positive = 8
    """Ray Train waits this long for its workers before it looks again: all of it passes after a node's death."""
    stop_within_s: Positive = 120
    """`ray job stop` waits this long for training to write its checkpoint."""
    health_check_period_ms: Positive = 2_000
    health_check_timeout_ms: Positive = 3_000
    health_check_failures: Positive = 3
    """A node that misses this many checks in a row is dead: a partition is noticed after about 15 s."""

    @model_validator(mode="after")
    def _rules(self) -> Cluster:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than max_workers={self.max_workers}; try {self.max_workers}"
            )
        return self

    @property
    def environment(self) -> dict[str, str]:
        """What every node's environment says, whoever starts it: Ray's own settings, no secrets."""
        return {
            "NCCL_SOCKET_FAMILY": "AF_INET",
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_within_s),
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(self.train_start_timeout_s),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_failure_threshold": str(self.health_check_failures),
            "RAY_health_check_initial_delay_ms": "5000",
            "RAY_health_check_period_ms": str(self.health_check_period_ms),
            "RAY_health_check_timeout_ms": str(self.health_check_timeout_ms),
        }
