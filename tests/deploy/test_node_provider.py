"""The node provider against a fake RunPod: Ray's questions, caps, faults, and nothing left behind."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException

from deploy.runpod import node_provider
from deploy.runpod.client import Client, NoKey
from deploy.runpod.node_provider import ProviderError, RunpodNodeProvider
from deploy.runpod.spend import Ledger
from tests.deploy.fake_runpod import KEY, FakeRunpod, Fault

HOME = Path(__file__).parents[2]
RTX, A100, H100 = "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
PROVIDER = {
    "type": "external", "module": "deploy.runpod.node_provider.RunpodNodeProvider", "ssh_port": 2222, "owner": "me",
    "public_key": "ssh-ed25519 AAAA", "max_workers": 4, "usd_per_hour_max": 5.0, "usd_total_max": 50.0, "start_timeout_s": 600,
    "secrets": ["WANDB_API_KEY"], "head_secrets": ["RUNPOD_ACCOUNT_KEY"], "environment": {"RAY_AUTH_MODE": "token"},
}  # fmt: skip
NODE = {"gpus": [RTX, A100], "gpus_per_node": 1, "image": "image:1", "disk_gb": 20, "regions": []}
WORKER = {"ray-node-type": "worker", "ray-user-node-type": "gpu", "ray-launch-request": "r1"}
HEAD = {"ray-node-type": "head", "ray-user-node-type": "head", "ray-launch-config": "abc"}


def provider(cluster: str = "moma", **changes: Any) -> RunpodNodeProvider:
    return RunpodNodeProvider(PROVIDER | changes, cluster)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_provider, "LISTING_PATIENCE_S", 0.6)


def test_tags_live_in_the_pod_and_outlive_the_autoscaler(runpod: FakeRunpod) -> None:
    ours = provider()
    ours.create_node(NODE, HEAD, 1)
    ours.create_node(NODE, WORKER, 2)
    ours.set_node_tags(ours.non_terminated_nodes(HEAD)[0], {"ray-node-status": "up-to-date"})
    assert ours.non_terminated_nodes({"ray-node-status": "up-to-date"}) == ours.non_terminated_nodes(HEAD)
    restarted = provider()
    assert len(restarted.non_terminated_nodes({})) == 3
    (head,) = restarted.non_terminated_nodes({"ray-node-type": "head"})
    assert restarted.node_tags(head) == HEAD | {"ray-node-status": "up-to-date"}
    assert "ray-node-status" not in ours.node_tags(ours.non_terminated_nodes(WORKER)[0])  # it is being set up here
    assert len(restarted.non_terminated_nodes({"ray-launch-request": "r1"})) == 2
    assert sorted(runpod.made)[0] == "moma-head"
    assert all(name.startswith("moma-") for name in runpod.made)
    assert len(set(runpod.made)) == 3


def test_what_a_pod_is_asked_for(runpod: FakeRunpod) -> None:
    (pod_id,) = provider().create_node(NODE | {"regions": ["EU-RO-1"]}, WORKER, 1)
    body = runpod.pods[pod_id]["body"]
    assert body["gpu"] == {"id": RTX, "count": 1}
    assert (body["globalNetworking"], body["ports"], body["dataCenterIds"]) == (True, ["2222/tcp"], ["EU-RO-1"])
    assert body["env"]["WANDB_API_KEY"] == "{{ RUNPOD_SECRET_WANDB_API_KEY }}"
    assert KEY not in json.dumps(body)
    (head,) = provider("led").create_node(NODE, HEAD, 1)
    assert "RUNPOD_ACCOUNT_KEY" not in body["env"], "a worker rents nothing"
    assert runpod.pods[head]["body"]["env"]["RUNPOD_ACCOUNT_KEY"] == "{{ RUNPOD_SECRET_RUNPOD_ACCOUNT_KEY }}"


def test_a_pods_own_key_gives_that_pod_back_and_nothing_else(runpod: FakeRunpod, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = provider().create_node(NODE, WORKER, 2)
    monkeypatch.setenv("RUNPOD_API_KEY", f"{KEY}-of-{one}")
    monkeypatch.setenv("RUNPOD_POD_ID", other)
    assert "read and write access" in command("leave").stderr
    monkeypatch.setenv("RUNPOD_POD_ID", one)
    assert command("leave").returncode == 0
    assert list(runpod.pods) == [other]


def test_of_two_raising_one_cluster_only_one_head_is_rented(runpod: FakeRunpod) -> None:
    (first,), (second,) = (provider().create_node(NODE, HEAD, 1) for _ in range(2))
    assert first == second
    assert runpod.made == ["moma-head"]


def test_clusters_do_not_see_each_other_and_a_taken_name_is_refused(runpod: FakeRunpod) -> None:
    provider("other").create_node(NODE, HEAD, 1)
    assert provider().non_terminated_nodes({}) == []
    with pytest.raises(ProviderError, match=r"other is taken: other-head .* Choose another cluster_name"):
        provider("other", owner="somebody else").non_terminated_nodes({})
    with pytest.raises(ProviderError, match="is taken"):
        provider("other", owner="somebody else").create_node(NODE, HEAD, 1)
    assert len(runpod.made) == 1


def test_without_capacity_the_next_region_and_the_next_gpu_are_asked(runpod: FakeRunpod) -> None:
    node = NODE | {"regions": ["EU-RO-1", "US-TX-3"]}
    runpod.without_capacity = {f"{RTX}@EU-RO-1"}
    (pod_id,) = provider().create_node(node, WORKER, 1)
    assert (runpod.pods[pod_id]["body"]["gpu"]["id"], runpod.pods[pod_id]["region"]) == (RTX, "US-TX-3")
    runpod.without_capacity = {RTX}
    (pod_id,) = provider().create_node(node, WORKER, 1)
    assert runpod.pods[pod_id]["body"]["gpu"]["id"] == A100
    runpod.without_capacity = {RTX, A100}
    with pytest.raises(NodeLaunchException, match=r"4090 in EU-RO-1: 400.*A100.*Add GPU types or regions"):
        provider().create_node(node, WORKER, 1)
    with pytest.raises(ProviderError, match="no head for moma: no GPU could be had"):
        provider().create_node(node, HEAD, 1)
    assert len(runpod.pods) == 2


def test_a_key_that_may_not_write_is_no_lack_of_capacity(runpod: FakeRunpod) -> None:
    runpod.faults = [Fault("POST", "/v2/pods", 403, times=2, detail="access denied")]
    with pytest.raises(ProviderError, match=r"no head for moma: this RUNPOD_API_KEY may not create pods .*read and write access"):
        provider().create_node(NODE, HEAD, 1)
    runpod.faults = [Fault("POST", "/v2/pods", 403, detail="your account cannot access this pool")]
    (pod_id,) = provider().create_node(NODE, WORKER, 1)
    assert runpod.pods[pod_id]["body"]["gpu"]["id"] == A100
    runpod.faults = [Fault("POST", "/v2/pods", 403), Fault("POST", "/v2/pods", 400, detail="no instances")]
    with pytest.raises(NodeLaunchException, match="no GPU could be had"):
        provider().create_node(NODE, WORKER, 1)


def test_a_head_that_ray_up_rented_and_could_not_set_up_goes(runpod: FakeRunpod, caplog: pytest.LogCaptureFixture) -> None:
    failed = {"ray-node-status": "update-failed"}
    laptop = provider()
    (head,) = laptop.create_node(NODE, HEAD, 1)
    (worker,) = laptop.create_node(NODE, WORKER, 1)
    again = provider()
    again.non_terminated_nodes({})
    with caplog.at_level(logging.ERROR):
        again.set_node_tags(head, failed)
    assert "moma-head is still rented, for $0.69/h: `ray up` tries again, `ray down` gives it back" in caplog.text
    laptop.set_node_tags(worker, failed)  # the autoscaler's business
    assert set(runpod.pods) == {head, worker}
    laptop.set_node_tags(head, failed)
    assert list(runpod.pods) == [worker]


@pytest.mark.parametrize(
    ("status", "detail", "said"), [(402, "balance", "add credit"), (400, "quota exceeded", "quota is used up")]
)
def test_no_money_is_not_tried_with_other_gpus(runpod: FakeRunpod, status: int, detail: str, said: str) -> None:
    runpod.faults = [Fault("POST", "/v2/pods", status, times=9, detail=detail)]
    with pytest.raises(ProviderError, match=said):
        provider().create_node(NODE, HEAD, 1)
    assert runpod.asked.count("POST /v2/pods") == 1
    assert runpod.pods == {}


def test_the_hourly_cap_counts_pods_that_are_still_starting(runpod: FakeRunpod) -> None:
    runpod.starts_after_s = 60
    ours = provider(usd_per_hour_max=2.0)
    with pytest.raises(NodeLaunchException, match=r"\$0.69/h is above the \$0.62/h left of provider.usd_per_hour_max"):
        ours.create_node(NODE, WORKER, 4)
    assert len(runpod.pods) == 2


def test_a_dear_gpu_is_passed_over_for_one_that_fits(runpod: FakeRunpod) -> None:
    (pod_id,) = provider(usd_per_hour_max=2.0).create_node(NODE | {"gpus": [H100, A100]}, WORKER, 1)
    assert runpod.pods[pod_id]["body"]["gpu"]["id"] == A100


def test_no_more_than_max_workers(runpod: FakeRunpod) -> None:
    with pytest.raises(NodeLaunchException, match="4 workers are rented already, max_workers is 4"):
        provider().create_node(NODE, WORKER, 6)
    assert len(runpod.pods) == 4


def test_at_the_total_cap_workers_go_and_the_head_goes_last(runpod: FakeRunpod, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = provider(usd_total_max=3.0)
    (head,) = ours.create_node(NODE, HEAD, 1)
    ours.create_node(NODE, WORKER, 2)
    for pod in runpod.pods.values():
        pod["made"] -= 3 * 3600
    ours.ledger.path.unlink()  # the head counts for itself
    on_the_head = provider(usd_total_max=3.0)
    monkeypatch.setenv("RUNPOD_POD_ID", head)
    assert on_the_head.non_terminated_nodes({}) == []
    assert runpod.pods == {}
    assert runpod.terminated[-1] == "moma-head"
    with pytest.raises(ProviderError, match=r"are spent, provider.usd_total_max is 3.0"):
        provider(usd_total_max=3.0).create_node(NODE, HEAD, 1)


def test_money_is_counted_across_restarts_and_pods_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMALISA_STATE", str(tmp_path))
    pod = {"id": "a", "cost": 2.0, "createdAt": "1970-01-01T00:00:00Z"}
    assert Ledger("moma").count([pod], now=1800) == pytest.approx(1.0)
    assert Ledger("moma").count([pod], now=3600) == pytest.approx(2.0)
    assert Ledger("moma").count([pod | {"id": "b", "createdAt": "1970-01-01T01:00:00+00:00"}], now=7200) == pytest.approx(4.0)
    (tmp_path / "spend-moma.json").write_text("half")
    assert Ledger("moma").total == 0


@pytest.mark.parametrize("status", ["dies", "cannot be pulled", "stopped"])
def test_a_pod_that_failed_is_given_back_with_its_reason(
    runpod: FakeRunpod, status: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runpod.dying, runpod.unpullable = int(status == "dies"), {"image:1"} if status == "cannot be pulled" else set()
    ours = provider()
    (pod_id,) = ours.create_node(NODE, HEAD, 1)
    if status == "stopped":
        Client.from_environment().stop(pod_id)
    if status == "cannot be pulled":
        assert not ours.is_terminated(pod_id)
        runpod.pods[pod_id]["made"] -= 601
    with caplog.at_level(logging.ERROR):
        assert ours.is_terminated(pod_id)
    assert runpod.pods == {}
    expected = {
        "dies": "it is ERROR",
        "cannot be pulled": "after 600 s; its log ends: error pulling image image:1",
        "stopped": "EXITED",
    }
    assert expected[status] in caplog.text
    assert ours.non_terminated_nodes({}) == []


def test_a_worker_that_died_is_seen_once_before_it_is_given_back(runpod: FakeRunpod) -> None:
    """Ray waits ten minutes for a launch whose pod it never saw."""
    runpod.dying, ours = 1, provider()
    (dead,), (alive,) = (ours.create_node(NODE, WORKER, 1) for _ in range(2))
    assert set(ours.non_terminated_nodes({})) == {dead, alive}
    assert ours.non_terminated_nodes({}) == [alive]
    assert list(runpod.pods) == [alive]


def test_while_the_api_is_down_ray_is_told_what_was_known(runpod: FakeRunpod, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = provider()
    ours.create_node(NODE, WORKER, 2)
    before = ours.non_terminated_nodes({})
    runpod.down = True
    assert ours.non_terminated_nodes({}) == before
    assert not ours.is_terminated(before[0])
    with pytest.raises(ProviderError, match="did not answer"):
        ours.terminate_node(before[0])
    with pytest.raises(NodeLaunchException, match="did not answer"):
        ours.create_node(NODE, WORKER, 1)
    with pytest.raises(ProviderError, match="did not answer"):
        provider().non_terminated_nodes({})  # a new one knows nothing, and must not say that there is nothing
    runpod.down = False
    assert ours.non_terminated_nodes({}) == before
    ours.terminate_nodes(before)
    assert ours.non_terminated_nodes({}) == []


def test_a_pod_that_vanished_is_no_node_and_one_just_made_is(runpod: FakeRunpod) -> None:
    ours = provider()
    first, second = ours.create_node(NODE, WORKER, 2)
    listed = ours.client.pods()
    runpod.vanish(first)
    object.__setattr__(ours.client, "pods", lambda: [pod for pod in listed if pod["id"] != second])  # the listing lags
    assert set(ours.non_terminated_nodes({})) == {first, second}
    object.__delattr__(ours.client, "pods")
    ours._born.clear()
    assert ours.non_terminated_nodes({}) == [second]
    assert ours.is_terminated(first)


def test_the_ssh_port_is_late_and_changes(runpod: FakeRunpod) -> None:
    runpod.maps_after_s = 3600
    ours = provider()
    (pod_id,) = ours.create_node(NODE, HEAD, 1)
    auth = {"ssh_user": "ray", "ssh_private_key": "/tmp/key"}
    runner = ours.get_command_runner("", pod_id, auth, "moma", subprocess, use_internal_ip=False)
    assert ours.is_running(pod_id) is False
    assert ours.external_ip(pod_id) is None
    with pytest.raises(ProviderError, match="no mapped SSH port yet"):
        runner._get_ssh_target()
    runpod.maps_after_s = 0
    assert ours.external_ip(pod_id) == "127.0.0.1"
    assert "-p 40022 ray@127.0.0.1" in runner.remote_shell_command_str()
    runpod.pods[pod_id]["public"] = 40_033
    assert runner._get_ssh_target() == "127.0.0.1"
    assert "Port=40033" in runner.ssh_options.to_ssh_options_list()
    inside = ours.get_command_runner("", pod_id, auth, "moma", subprocess, use_internal_ip=True)
    assert inside._get_ssh_target() == ours.internal_ip(pod_id) == "10.0.0.7"
    assert "Port=2222" in inside.ssh_options.to_ssh_options_list()
    runpod.vanish(pod_id)
    with pytest.raises(ProviderError, match="is gone"):
        inside._get_ssh_target()


def cluster_config(tmp_path: Path, **node: Any) -> dict[str, Any]:
    (tmp_path / "key.pub").write_text("ssh-ed25519 AAAA somebody@somewhere\n")
    return {
        "provider": {}, "max_workers": 2, "auth": {"ssh_private_key": str(tmp_path / "key")},
        "available_node_types": {"head": {"node_config": NODE | node}},
    }  # fmt: skip


def test_everything_is_looked_at_before_anything_is_rented(
    runpod: FakeRunpod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RunpodNodeProvider.bootstrap_config(cluster_config(tmp_path))
    assert made["provider"]["public_key"].startswith("ssh-ed25519 AAAA")
    assert made["provider"]["owner"] == RunpodNodeProvider.bootstrap_config(cluster_config(tmp_path))["provider"]["owner"]
    wrong = {"gpus": ["RTX 4090"]}, {"gpus_per_node": 9}, {"image": "ghcr.io/YOUR-ORG/momalisa:1"}
    saying = "'RTX 4090' is no GPU type.*NVIDIA GeForce RTX 4090", "at most 8", "is a placeholder.*cluster.image"
    for change, said in zip(wrong, saying, strict=True):
        with pytest.raises(ProviderError, match=said):
            RunpodNodeProvider.bootstrap_config(cluster_config(tmp_path, **change))
    config = cluster_config(tmp_path)
    (tmp_path / "key.pub").unlink()
    with pytest.raises(ProviderError, match="ssh-keygen -t ed25519"):
        RunpodNodeProvider.bootstrap_config(config)
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_wrong")
    with pytest.raises(ProviderError, match="does not know this RUNPOD_API_KEY"):
        RunpodNodeProvider.bootstrap_config(cluster_config(tmp_path))
    monkeypatch.delenv("RUNPOD_API_KEY")
    with pytest.raises(ProviderError, match="RUNPOD_API_KEY is not set"):
        RunpodNodeProvider.bootstrap_config(cluster_config(tmp_path))
    assert runpod.made == []


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "deploy.runpod", *arguments]
    return subprocess.run(line, cwd=HOME, capture_output=True, text=True, check=False, input="n\n")


def test_pods_that_no_cluster_owns_are_found_and_given_back(runpod: FakeRunpod, monkeypatch: pytest.MonkeyPatch) -> None:
    led, lost, headless = provider("led"), provider("lost"), provider("headless")
    led.create_node(NODE, HEAD, 1)
    kept = list(led.create_node(NODE, WORKER, 1))
    orphans = [*lost.create_node(NODE, WORKER, 2), *headless.create_node(NODE, WORKER, 1)]
    runpod.dying = 1
    orphans += headless.create_node(NODE, HEAD, 1)
    stranger = Client.from_environment().create({"name": "a colleague's", "image": "x", "gpu": {"id": RTX, "count": 1}, "disk": 5,
                                                 "ports": ["22/tcp"], "env": {}})  # fmt: skip
    listing = command("ls")
    assert "6 pods, $3.45/h" in listing.stdout
    assert all(pod_id in listing.stdout for pod_id in kept + orphans)
    assert "nothing was done" in command("gc").stderr
    assert len(runpod.pods) == 7
    assert "4 pods given back" in command("gc", "--yes").stdout
    assert set(orphans) & set(runpod.pods) == set()
    assert {*kept, stranger["id"]} <= set(runpod.pods)
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_wrong")
    refused = command("ls")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "make a new one" in refused.stderr


def test_a_provider_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    with pytest.raises(ProviderError, match="is not set"):
        provider()
    with pytest.raises(NoKey):
        Client.from_environment()
