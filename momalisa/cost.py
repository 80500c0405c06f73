"""What a run will need before anything is rented: nodes, hours, dollars, bytes over the network, and what that rests on.

The model: a training image costs 3 forward passes of the UNet (one forward, two backward; one more with gradient
checkpointing), and a GPU reaches UTILISATION of its peak. A ring all-reduce moves 2 (n - 1) / n of the gradients
through each of n nodes' links in every step (Patarasuk and Yuan, 2009); gradients are fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from momalisa.config import Settings
from momalisa.config.cluster import Gpu

Cloud = Literal["runpod", "gke"]

UTILISATION = 0.35  # of the bf16 peak, in training
UNET_TFLOP = 0.803  # forward, one 512x512 picture (64x64 latents), SD 1.x
VAE_TFLOP = 1.12  # encode one 512x512 picture
CAPTIONS_PER_S = 100.0  # BLIP-base with the KV cache, one GPU of the smallest kind here
UNET_PARAMETERS = 859.5e6  # SD 1.x
MINIATURE_PARAMETERS = 5.8e6
LORA_PARAMETERS_PER_RANK = 199_296  # q, k, v and out of all attention layers of SD 1.x
GKE_FEE_USD_PER_HOUR = 0.10  # Google's, for a cluster
GKE_BASE_NODES = 3  # one in each zone of a regional cluster: heads, Redis and the operator
GKE_CPU_NODE_USD_PER_HOUR = 0.134  # e2-standard-4 on demand
STARTUP_H = 0.15  # renting, pulling the image, loading
SLOW_LINK_MBIT = 1_000.0


class Refused(ValueError):
    """The plan would waste money; the message holds the arithmetic and the way out."""


@dataclass(frozen=True)
class Estimate:
    """One run on one cloud."""

    cloud: Cloud
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    images_per_s: float  # all GPUs together, exchange of gradients included
    compute_s: float  # of a step
    exchange_s: float  # of a step
    step_bytes: float  # through one node's link
    network_bytes: float  # over all links in the whole run, checkpoints and latents included
    hours: dict[str, float]  # by stage
    usd_per_hour: float
    collect_usd_per_hour: float  # while works are collected: GKE has nodes without a GPU for that
    always_usd_per_hour: float  # of both: before and after the run too, until the cluster is deleted
    rests_on: tuple[str, ...]

    @property
    def total_hours(self) -> float:
        return sum(self.hours.values())

    @property
    def usd(self) -> float:
        collecting = self.hours["collect"]
        return collecting * self.collect_usd_per_hour + (self.total_hours - collecting) * self.usd_per_hour


def estimate(settings: Settings, cloud: Cloud, works: int) -> Estimate:
    """Raises Refused where the settings want what the cluster may not have: more GPUs, more money an hour, TLS on RunPod."""
    train, cluster, gpu = settings.train, settings.cluster, settings.cluster.gpus[0]
    gpus = max(math.ceil(train.workers * train.gpus_per_worker), 1)
    if gpus > (most := cluster.max_workers * cluster.gpus_per_node):
        raise Refused(
            f"train.workers={train.workers} x gpus_per_worker={train.gpus_per_worker:g} are {gpus} GPUs, but the cluster has "
            f"at most {most} (cluster.max_workers={cluster.max_workers} x gpus_per_node={cluster.gpus_per_node}): the job would "
            f"wait for ever. Try cluster.max_workers={math.ceil(gpus / cluster.gpus_per_node)} or train.workers={most}"
        )
    if cloud == "runpod" and cluster.tls:
        raise Refused("cluster.tls=true is for GKE: RunPod's nodes would talk without it. Set it to false, or plan --on gke")
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    one_gpu, basis = images_per_s(settings, gpu)
    compute_s = train.batch / (one_gpu * gpus)
    parameters, which = trained_parameters(settings)
    step_bytes = 2 * (nodes - 1) / nodes * 4 * parameters
    link = cluster.link_mbit_per_s if cloud == "runpod" else cluster.gke_link_mbit_per_s
    exchange_s = 8 * step_bytes / (link * 1e6)
    speed = train.batch / (compute_s + exchange_s)
    steps = math.ceil(train.images / train.batch)
    price = gpu.runpod_usd_per_hour if cloud == "runpod" else gpu.gke_usd_per_hour
    always = 0.0 if cloud == "runpod" else GKE_FEE_USD_PER_HOUR + GKE_BASE_NODES * GKE_CPU_NODE_USD_PER_HOUR
    head = cluster.head_gpu.runpod_usd_per_hour if cloud == "runpod" else always
    per_hour = nodes * cluster.gpus_per_node * price + head
    collecting = per_hour if cloud == "runpod" else always + cluster.max_cpu_workers * GKE_CPU_NODE_USD_PER_HOUR
    if per_hour > cluster.usd_per_hour_max:
        raise Refused(
            f"{nodes} nodes and a head are ${per_hour:.2f}/h, above cluster.usd_per_hour_max={cluster.usd_per_hour_max:g}; "
            f"rent fewer or raise it"
        )
    return Estimate(
        cloud=cloud,
        gpu=gpu,
        nodes=nodes,
        gpus_per_node=cluster.gpus_per_node,
        images_per_s=speed,
        compute_s=compute_s,
        exchange_s=exchange_s,
        step_bytes=step_bytes,
        network_bytes=steps * step_bytes * nodes + stored_bytes(settings, works, nodes),
        hours=stage_hours(settings, works, gpus, speed, gpu),
        usd_per_hour=per_hour,
        collect_usd_per_hour=collecting,
        always_usd_per_hour=always,
        rests_on=(
            basis,
            f"{which}, {4 * parameters / 1e9:.3g} GB of gradients in fp32",
            f"{link:g} Mbit/s between nodes, as {'RunPod documents for global networking' if cloud == 'runpod' else 'GKE gives'}",
            f"list prices in the settings (cluster.gpus): ${price:g}/h for a {gpu.runpod if cloud == 'runpod' else gpu.gke}",
            f"{works:,} works, {STARTUP_H * 60:.0f} minutes to rent and load",
        ),
    )


def check(found: Estimate, settings: Settings) -> None:
    """Raises Refused for full fine-tuning over a slow link that takes longer than the computing."""
    link = settings.cluster.link_mbit_per_s if found.cloud == "runpod" else settings.cluster.gke_link_mbit_per_s
    if found.nodes == 1 or settings.train.lora_rank is not None or link > SLOW_LINK_MBIT or found.exchange_s < found.compute_s:
        return
    gpus = found.nodes * found.gpus_per_node
    raise Refused(
        f"full fine-tuning over {found.nodes} nodes on {link:g} Mbit/s: each step moves 2 x ({found.nodes} - 1) / "
        f"{found.nodes} x {4 * trained_parameters(settings)[0] / 1e9:.2f} GB = {found.step_bytes / 1e9:.2f} GB through "
        f"a node's link, {found.exchange_s:.0f} s, to compute for {found.compute_s:.1f} s. Take one node with {gpus} GPUs "
        f"(cluster.gpus_per_node={gpus}), or adapters (train.lora_rank=8: under a second), or say --force"
    )


def images_per_s(settings: Settings, gpu: Gpu) -> tuple[float, str]:
    """Of one GPU, and where the figure is from."""
    if settings.cluster.images_per_s_per_gpu is not None:
        return settings.cluster.images_per_s_per_gpu, f"{settings.cluster.images_per_s_per_gpu:g} images/s and GPU, measured"
    passes = 4 if settings.train.gradient_checkpointing else 3
    speed = gpu.tflops * UTILISATION / (passes * UNET_TFLOP * area(settings))
    return speed, (
        f"{speed:.1f} images/s and GPU, a model: {gpu.tflops:g} TFLOP/s x {UTILISATION:g} / ({passes} x {UNET_TFLOP} TFLOP at "
        f"{settings.encode.resolution_px}px); set cluster.images_per_s_per_gpu once it is measured"
    )


def area(settings: Settings) -> float:
    """Of a picture, in 512x512."""
    return (settings.encode.resolution_px / 512) ** 2


def sides(settings: Settings) -> int:
    """How often a picture is encoded: its mirror image may be too."""
    return 1 + settings.encode.mirrored


def trained_parameters(settings: Settings) -> tuple[float, str]:
    if settings.train.lora_rank is not None:
        return LORA_PARAMETERS_PER_RANK * settings.train.lora_rank, f"LoRA of rank {settings.train.lora_rank}"
    if settings.diffusion.model.startswith("miniature://"):
        return MINIATURE_PARAMETERS, "full fine-tuning of the miniature UNet"
    return UNET_PARAMETERS, "full fine-tuning of a UNet of SD 1.x's size"


def stored_bytes(settings: Settings, works: int, nodes: int) -> float:
    """To and from the bucket: latents to every node, and checkpoints (weights and EMA; trainer state is three times those)."""
    parameters, _ = trained_parameters(settings)
    checkpoints = math.ceil(settings.train.images / settings.train.checkpoint_every_images)
    return nodes * works * sides(settings) * 64 * 1024 * area(settings) + checkpoints * 4 * 4 * parameters


def stage_hours(settings: Settings, works: int, gpus: int, images_per_s: float, gpu: Gpu) -> dict[str, float]:
    """By stage; collecting is paced by the host that is asked."""
    rate = min(settings.collect.requests_per_second, 20.0)
    reach = gpu.tflops * UTILISATION
    drawn = 2 * settings.promote.distance_pictures * settings.promote.distance_steps * 2 * UNET_TFLOP * area(settings) / reach
    return {
        "start": STARTUP_H,
        "collect": works / rate / 3600,
        "caption": works / (CAPTIONS_PER_S * gpus) / 3600,
        "encode": works * sides(settings) * VAE_TFLOP * area(settings) / (reach * gpus) / 3600,
        "train": settings.train.images / images_per_s / 3600,
        "promote": drawn / 3600,
    }


def always(found: Estimate) -> list[str]:
    """What a cluster costs that nobody uses; on RunPod there is none then."""
    if not found.always_usd_per_hour:
        return []
    return [
        f"always   {found.always_usd_per_hour:.2f} of that, idle or not, until `make gke-down`: "
        f"{GKE_BASE_NODES} base nodes and Google's fee"
    ]


def describe(found: Estimate) -> str:
    """The estimate for people."""
    lines = [
        f"on       {found.cloud}: {found.nodes} node{'s' * (found.nodes > 1)} of {found.gpus_per_node} GPU, and a head",
        f"hours    {found.total_hours:.2f} ({', '.join(f'{stage} {hours:.2f}' for stage, hours in found.hours.items())})",
        f"dollars  {found.usd:.2f} at {found.usd_per_hour:.2f} an hour, {found.collect_usd_per_hour:.2f} while collecting",
        *always(found),
        f"network  {found.network_bytes / 1e9:.1f} GB; a step moves {found.step_bytes / 1e9:.3g} GB through each node's link: "
        f"{found.exchange_s:.2f} s beside {found.compute_s:.2f} s of computing",
        f"speed    {found.images_per_s:.1f} images/s in training",
        *(f"rests on {reason}" for reason in found.rests_on),
    ]
    return "\n".join(lines)
