"""Ray's node provider for RunPod (`provider: {type: external, module: deploy.runpod.node_provider.RunpodNodeProvider}`).

RunPod has no tags, so a pod carries those that Ray gives it at birth as JSON in its environment, and its name says
which cluster it is of. Tags that Ray changes later (its progress in setting a node up) live in the process that sets it
up: changing a pod's environment could restart it. To every other process a running pod is up to date, and Ray finds its
running nodes by RAY_CLOUD_INSTANCE_ID.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import click
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    STATUS_UPDATE_FAILED,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
)

from deploy.runpod.client import FAILED, KEY, Client, NoCapacity, NoKey, NoMoney, NotAllowed, Pod, RunpodError, Unreachable
from deploy.runpod.spend import Ledger, made_at
from momalisa.config.cluster import PLACEHOLDER

logger = logging.getLogger(__name__)

TAGS, CLUSTER, OWNER = "MOMALISA_RAY_TAGS", "MOMALISA_CLUSTER", "MOMALISA_OWNER"
POD_ID = "RUNPOD_POD_ID"
LISTING_PATIENCE_S = 10.0  # then Ray is told what was known last
VISIBLE_WITHIN_S = 60.0  # a new pod may be missing from the listing that long


class ProviderError(click.ClickException):
    """`ray up` prints its message alone."""


class MappedPortRunner(SSHCommandRunner):
    """SSH on the port that RunPod maps, asked for anew with each command: a restarted pod gets another one."""

    def _get_ssh_target(self) -> str:
        self._ensure_ssh_control_path()  # type: ignore[no-untyped-call]
        host, port = self.provider.ssh_endpoint(self.node_id, self.use_internal_ip)
        self.ssh_options.arg_dict["Port"] = port
        return str(host)

    def run(self, *arguments: Any, ssh_options_override_ssh_key: str = "", **options: Any) -> Any:
        """Ray's override of the key would lose the port; it is the same key."""
        return super().run(*arguments, **options)

    def remote_shell_command_str(self) -> str:
        host = self._get_ssh_target()
        key = f" -i {shlex.quote(self.ssh_private_key)}" if self.ssh_private_key else ""
        return f"ssh -o IdentitiesOnly=yes{key} -p {self.ssh_options.arg_dict['Port']} {self.ssh_user}@{host}\n"


class RunpodNodeProvider(NodeProvider):
    """Pods of one cluster. Thread-safe: Ray's launchers, updaters and main loop share it."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.client = client(LISTING_PATIENCE_S)
        self.ledger = Ledger(cluster_name)
        self._lock = threading.RLock()
        self._pods: dict[str, Pod] = {}
        self._listed = False
        self._born: dict[str, float] = {}  # when we made a pod, by our clock
        self._told: set[str] = set()  # pods that Ray knows of
        self._given_back: set[str] = set()
        self._later_tags: dict[str, dict[str, str]] = {}
        self._prices: dict[str, float] = {}

    # What Ray asks

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Asks RunPod. While it does not answer Ray is told what was known last: else it would rent everything again."""
        with self._lock:
            try:
                self._refresh()
            except Unreachable as error:
                if not self._listed:
                    raise ProviderError(str(error)) from None
                logger.warning("%s; going on with %d pods known before", error, len(self._pods))
            except RunpodError as error:
                raise ProviderError(str(error)) from None
            self._told.update(self._pods)
            return [pod_id for pod_id in self._pods if tag_filters.items() <= self.node_tags(pod_id).items()]

    def is_running(self, node_id: str) -> bool:
        with self._lock:
            return bool(self._pods.get(node_id, {}).get("status") == "RUNNING")

    def is_terminated(self, node_id: str) -> bool:
        """Asks about this very pod; one that failed is given back at once."""
        pod = self._pod(node_id)
        if pod is not None and (reason := self._failure(pod)):
            self._give_back(pod, reason)
            return True
        return pod is None

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self._lock:
            pod = self._pods.get(node_id)
            tags = tags_of(pod) if pod else {}
            if pod and pod["status"] == "RUNNING" and node_id not in self._born:
                tags |= {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}  # else `ray dashboard` would not take it for a head
            return tags | self._later_tags.get(node_id, {})

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._lock:
            self._later_tags.setdefault(node_id, {}).update(tags)
            pod = self._pods.get(node_id)
        if pod is not None and tags.get(TAG_RAY_NODE_STATUS) == STATUS_UPDATE_FAILED and kind_of(pod) == NODE_KIND_HEAD:
            self._head_failed(pod)

    def internal_ip(self, node_id: str) -> str | None:  # type: ignore[override]  # Ray waits for it
        """The address in RunPod's global network; None until it is given."""
        pod = self._known(node_id)
        return pod["globalNetworking"].get("ip") if pod else None

    def external_ip(self, node_id: str) -> str | None:  # type: ignore[override]
        """The address that the SSH port is mapped on; None until it is."""
        mapping = self._mapping(self._known(node_id))
        return mapping[0] if mapping else None

    def ssh_endpoint(self, node_id: str, inside: bool) -> tuple[str, int]:
        """Host and port, asked for now: mappings come late and change. Raises ProviderError where there is none yet."""
        pod = self._pod(node_id)
        if pod is None:
            raise ProviderError(f"pod {node_id} is gone")
        if inside and (address := pod["globalNetworking"].get("ip")):
            return str(address), int(self.provider_config["ssh_port"])
        if not inside and (mapping := self._mapping(pod)):
            return mapping
        raise ProviderError(f"pod {node_id} ({pod['status']}) has no {'private address' if inside else 'mapped SSH port'} yet")

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Rent pods, one by one, each only if the cluster stays below its caps with it."""
        made = {}
        for _ in range(count):
            try:
                with self._lock:
                    pod = self._create(node_config, tags)
                    self._pods[pod["id"]], self._born[pod["id"]] = pod, time.monotonic()
            except (RunpodError, ProviderError) as error:
                if tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD:
                    raise ProviderError(f"no head for {self.cluster_name}: {error}") from None
                raise NodeLaunchException(type(error).__name__[:19], str(error), None) from None
            made[pod["id"]] = pod
        return made

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            try:
                self.client.terminate(node_id)
            except RunpodError as error:
                raise ProviderError(str(error)) from None
            self._forget(node_id)

    def get_command_runner(
        self,
        log_prefix: str,
        node_id: str,
        auth_config: dict[str, Any],
        cluster_name: str,
        process_runner: Any,
        use_internal_ip: bool,
        docker_config: dict[str, Any] | None = None,
    ) -> MappedPortRunner:
        """The pod is the container: `docker_config` is not looked at."""
        return MappedPortRunner(  # type: ignore[no-untyped-call]
            log_prefix, node_id, self, auth_config, cluster_name, process_runner, use_internal_ip=use_internal_ip
        )

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """On the laptop, before anything is rented: key, balance of settings, GPU types. Says whose cluster it is."""
        provider = cluster_config["provider"]
        public = Path(str(cluster_config["auth"]["ssh_private_key"]) + ".pub").expanduser()
        if not public.is_file():
            raise ProviderError(f"{public} is not there; make a key pair of its own: ssh-keygen -t ed25519 -f {str(public)[:-4]}")
        provider["public_key"] = public.read_text().strip()
        provider["owner"] = hashlib.sha256(" ".join(provider["public_key"].split()[:2]).encode()).hexdigest()[:16]
        provider["max_workers"] = cluster_config["max_workers"]
        try:
            known = client().gpu_types()
        except RunpodError as error:
            raise ProviderError(str(error)) from None
        for name, node_type in cluster_config["available_node_types"].items():
            check_image(name, node_type)
            check_gpus(name, node_type, known)
        return cluster_config

    # How

    def _refresh(self) -> None:
        """List, take in, give back what failed, count the money. Raises RunpodError, or ProviderError for a taken name.

        A worker is given back only after Ray has seen it: for one that came and went unseen Ray would wait ten minutes.
        """
        mine = {pod["id"]: pod for pod in self.client.pods() if pod["env"].get(CLUSTER) == self.cluster_name}
        self._check_owner(mine.values())
        now = time.monotonic()
        for pod_id, born in self._born.items():
            if now - born < VISIBLE_WITHIN_S and pod_id in self._pods and pod_id not in mine:
                mine[pod_id] = self._pods[pod_id]
        self._pods = {pod_id: pod for pod_id, pod in mine.items() if pod_id not in self._given_back}
        self._listed = True
        for pod in list(self._pods.values()):
            seen = pod["id"] in self._told or kind_of(pod) == NODE_KIND_HEAD
            if seen and (reason := self._failure(pod)):
                self._give_back(pod, reason)
        self._hold_total()

    def _check_owner(self, pods: Any) -> None:
        others = [pod["name"] for pod in pods if pod["env"].get(OWNER) != self.provider_config["owner"]]
        if others:
            raise ProviderError(
                f"the cluster name {self.cluster_name} is taken: {', '.join(others)} belong to another SSH key. Choose another "
                f"cluster_name (`ray up cluster.yaml --cluster-name NAME`), or use the key that it was made with"
            )

    def _failure(self, pod: Pod) -> str:
        """Why a pod will never be a node; empty while it may."""
        if pod["status"] in FAILED:
            return f"it is {pod['status']}"
        limit_s = float(self.provider_config["start_timeout_s"])
        if pod["status"] != "RUNNING" and time.time() - made_at(pod) > limit_s:
            return f"it is still {pod['status']} after {limit_s:.0f} s"
        return ""

    def _give_back(self, pod: Pod, reason: str) -> None:
        words = self.client.last_words(pod["id"])
        logger.error(
            "pod %s (%s) is given back: %s%s",
            pod["name"], pod["image"], reason, f"; its log ends: {words}" if words else "; can its image be pulled?",
        )  # fmt: skip
        try:
            self.client.terminate(pod["id"])
        except RunpodError as error:
            logger.warning("it could not be given back now (%s): again at the next look", error)
            return
        with self._lock:
            self._given_back.add(pod["id"])
            self._forget(pod["id"])

    def _head_failed(self, pod: Pod) -> None:
        """`ray up` could not set it up. What it rented itself goes; a head that was there before may be worth a look."""
        if pod["id"] in self._born:
            self._give_back(pod, "it could not be set up, the reason is below")
            return
        logger.error(
            "pod %s is still rented, for $%.2f/h: `ray up` tries again, `ray down` gives it back", pod["name"], pod["cost"]
        )

    def _forget(self, node_id: str) -> None:
        self._pods.pop(node_id, None)
        self._born.pop(node_id, None)
        self._given_back.add(node_id)

    def _hold_total(self) -> None:
        """At the total cap everything goes: workers, and, where this is the head, its own pod last."""
        spent, cap = self.ledger.count(self._pods.values()), float(self.provider_config["usd_total_max"])
        if spent < cap:
            return
        here = os.environ.get(POD_ID)
        for pod in sorted(self._pods.values(), key=lambda pod: pod["id"] == here):
            if kind_of(pod) == NODE_KIND_WORKER or pod["id"] == here:
                self._give_back(pod, f"${spent:.2f} are spent, provider.usd_total_max is {cap:.2f}")

    def _create(self, node_config: dict[str, Any], tags: dict[str, str]) -> Pod:
        """The first candidate that can be placed and paid."""
        self._refresh()
        self._check_caps(tags)
        kind = tags[TAG_RAY_NODE_KIND]
        name = f"{self.cluster_name}-{kind}" + ("" if kind == NODE_KIND_HEAD else f"-{uuid.uuid4().hex[:12]}")
        refused: list[str] = []
        errors: list[NoCapacity] = []
        for gpu in node_config["gpus"]:
            room = float(self.provider_config["usd_per_hour_max"]) - self._usd_per_hour()
            if (price := self._price(gpu) * node_config["gpus_per_node"]) > room:
                refused.append(f"{gpu}: ${price:.2f}/h is above the ${room:.2f}/h left of provider.usd_per_hour_max")
                continue
            for region in node_config.get("regions") or [None]:
                try:
                    return self.client.create(self._body(node_config, tags, name, gpu, region))
                except NoCapacity as error:
                    errors.append(error)
                    refused.append(f"{gpu}{f' in {region}' if region else ''}: {error}")
        if errors and all(isinstance(error, NotAllowed) for error in errors):
            raise NoKey(
                403,
                f"this {KEY} may not create pods ({'; '.join(refused)}); give it read and write access to pods in the console",
            )
        raise NoCapacity(0, f"no GPU could be had: {'; '.join(refused)}. Add GPU types or regions, or try again later")

    def _check_caps(self, tags: dict[str, str]) -> None:
        workers = sum(kind_of(pod) == NODE_KIND_WORKER for pod in self._pods.values())
        most = int(self.provider_config["max_workers"])
        if tags[TAG_RAY_NODE_KIND] == NODE_KIND_WORKER and workers >= most:
            raise ProviderError(f"{workers} workers are rented already, max_workers is {most}")
        if self.ledger.total >= float(self.provider_config["usd_total_max"]):
            raise NoMoney(
                0,
                f"${self.ledger.total:.2f} are spent, provider.usd_total_max is {self.provider_config['usd_total_max']}; "
                f"raise it, or delete {self.ledger.path} to count anew",
            )

    def _usd_per_hour(self) -> float:
        return sum(max(float(pod["cost"]), self._price_of(pod)) for pod in self._pods.values())

    def _price_of(self, pod: Pod) -> float:
        """A pod that is being made may not cost yet."""
        if pod["status"] in FAILED or float(pod["cost"]) or "gpu" not in pod:
            return 0.0
        return self._price(pod["gpu"]["id"]) * int(pod["gpu"].get("count", 1))

    def _price(self, gpu: str) -> float:
        """USD per hour and GPU on RunPod's own machines."""
        if gpu not in self._prices:
            self._prices = {name: float(found["price"]["secure"]) for name, found in self.client.gpu_types().items()}
        if gpu not in self._prices:
            raise ProviderError(unknown_gpu(gpu, self._prices))
        return self._prices[gpu]

    def _body(self, node_config: dict[str, Any], tags: dict[str, str], name: str, gpu: str, region: str | None) -> dict[str, Any]:
        """A CreatePodRequest. Secrets are references that RunPod fills in; a worker gets no key that could rent."""
        names = [*self.provider_config["secrets"]]
        if tags[TAG_RAY_NODE_KIND] == NODE_KIND_HEAD:
            names += self.provider_config["head_secrets"]
        secrets = {secret: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for secret in names}
        own = {
            CLUSTER: self.cluster_name,
            OWNER: self.provider_config["owner"],
            TAGS: json.dumps(tags, sort_keys=True),
            "PUBLIC_KEY": self.provider_config["public_key"],
        }
        body = {
            "name": name,
            "image": node_config["image"],
            "gpu": {"id": gpu, "count": node_config["gpus_per_node"]},
            "cloud": "SECURE",
            "globalNetworking": True,
            "ports": [f"{self.provider_config['ssh_port']}/tcp"],
            "disk": node_config["disk_gb"],
            "env": {**self.provider_config["environment"], **secrets, **own},
            "startSsh": True,
        }
        return body | ({"dataCenterIds": [region]} if region else {})

    def _known(self, node_id: str) -> Pod | None:
        """From the last listing, or asked for where that lacks what Ray waits for."""
        with self._lock:
            pod = self._pods.get(node_id)
        if pod is None or pod["status"] != "RUNNING" or not pod["globalNetworking"].get("ip") or not self._mapping(pod):
            return self._pod(node_id)
        return pod

    def _pod(self, node_id: str) -> Pod | None:
        """Asked for now; while RunPod does not answer, as it was known."""
        try:
            pod = self.client.pod(node_id)
        except Unreachable:
            with self._lock:
                return self._pods.get(node_id)
        except RunpodError as error:
            raise ProviderError(str(error)) from None
        with self._lock:
            if pod is not None and node_id not in self._given_back:
                self._pods[node_id] = pod
        return pod

    def _mapping(self, pod: Pod | None) -> tuple[str, int] | None:
        """Public address and port of the SSH port."""
        for port in ((pod or {}).get("runtime") or {}).get("ports", []):
            if port.get("private") == self.provider_config["ssh_port"] and port.get("public") and port.get("ip"):
                return str(port["ip"]), int(port["public"])
        return None


def client(patience_s: float = 60.0) -> Client:
    """Raises ProviderError where there is no key."""
    try:
        return Client.from_environment(patience_s)
    except RunpodError as error:
        raise ProviderError(str(error)) from None


def tags_of(pod: Pod) -> dict[str, str]:
    """The tags that Ray gave at birth; none for a pod of somebody else."""
    try:
        return dict(json.loads(pod["env"][TAGS]))
    except (KeyError, ValueError):
        return {}


def kind_of(pod: Pod) -> str:
    return tags_of(pod).get(TAG_RAY_NODE_KIND, "")


def unknown_gpu(gpu: str, known: Any) -> str:
    return f"{gpu!r} is no GPU type of RunPod's; it has: {', '.join(sorted(known))}"


def check_image(name: str, node_type: dict[str, Any]) -> None:
    """Raises ProviderError for an image that cannot be: a pod would be paid for until it is given up."""
    image = str(node_type["node_config"]["image"])
    if PLACEHOLDER in image:
        raise ProviderError(
            f"available_node_types.{name}: the image {image!r} is a placeholder; push yours, name it in cluster.image of your "
            f"settings, and run `make manifests`"
        )


def check_gpus(name: str, node_type: dict[str, Any], known: dict[str, dict[str, Any]]) -> None:
    """Raises ProviderError for GPU types that RunPod has not, or not so many of in one pod."""
    wanted = node_type["node_config"]
    for gpu in wanted["gpus"]:
        if gpu not in known:
            raise ProviderError(f"available_node_types.{name}: {unknown_gpu(gpu, known)}")
        if wanted["gpus_per_node"] > (most := known[gpu]["maxCount"]["secure"]):
            raise ProviderError(
                f"available_node_types.{name}: gpus_per_node={wanted['gpus_per_node']}, but a pod has at most {most} of {gpu}"
            )
