"""The plan before renting: its arithmetic, its refusals, and that more of anything never costs less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from momalisa import cost
from momalisa.config import Settings, from_file

HOME = Path(__file__).parents[1]


def sd14(*overrides: str) -> Settings:
    return from_file(str(HOME / "configs" / "sd14.yaml"), list(overrides))


SD14 = sd14()


def test_the_arithmetic_of_a_step() -> None:
    found = cost.estimate(sd14("--train.workers=4", "--cluster.images_per_s_per_gpu=10"), "runpod", 1000)
    assert (found.nodes, found.gpus_per_node) == (4, 1)
    assert found.step_bytes == pytest.approx(2 * 3 / 4 * 4 * 859.5e6)
    assert found.exchange_s == pytest.approx(found.step_bytes * 8 / 100e6)  # 412 s
    assert found.compute_s == pytest.approx(32 / 40)
    assert found.hours["train"] == pytest.approx(20_000 / 32 * (found.exchange_s + found.compute_s) / 3600)
    assert found.usd_per_hour == pytest.approx(4 * 1.49 + 0.69)
    assert "measured" in found.rests_on[0]


def test_on_gke_the_base_is_paid_always_and_collecting_takes_no_gpu() -> None:
    found = cost.estimate(sd14("--cluster.max_cpu_workers=1"), "gke", 36_000)
    always = 0.10 + 3 * 0.134
    assert found.always_usd_per_hour == pytest.approx(always)
    assert found.usd_per_hour == pytest.approx(always + 1.57)
    assert found.collect_usd_per_hour == pytest.approx(always + 0.134)
    others = sum(hours for stage, hours in found.hours.items() if stage != "collect")
    assert found.usd == pytest.approx(found.hours["collect"] * (always + 0.134) + others * (always + 1.57))
    assert "always   0.50 of that, idle or not, until `make gke-down`" in cost.describe(found)
    assert "always" not in cost.describe(cost.estimate(SD14, "runpod", 1000))


def test_tls_is_refused_where_it_would_not_be() -> None:
    settings = sd14("--cluster.tls=true")
    cost.estimate(settings, "gke", 1000)
    with pytest.raises(cost.Refused, match=r"cluster.tls=true is for GKE"):
        cost.estimate(settings, "runpod", 1000)


def test_full_fine_tuning_over_slow_links_is_refused_with_the_arithmetic() -> None:
    settings = sd14("--train.workers=4")
    with pytest.raises(cost.Refused, match=r"2 x \(4 - 1\) / 4 x 3.44 GB = 5.16 GB.*413 s.*gpus_per_node=4.*lora_rank=8"):
        cost.check(cost.estimate(settings, "runpod", 1000), settings)
    cost.check(cost.estimate(settings, "gke", 1000), settings)


@pytest.mark.parametrize("way_out", ["--cluster.gpus_per_node=4", "--train.lora_rank=8"])
def test_the_ways_out_that_a_refusal_names_are_ways_out(way_out: str) -> None:
    settings = sd14("--train.workers=4", way_out)
    found = cost.estimate(settings, "runpod", 1000)
    cost.check(found, settings)
    assert found.exchange_s < 1


def test_more_gpus_than_the_cluster_may_have_are_refused() -> None:
    with pytest.raises(
        cost.Refused, match=r"are 8 GPUs, but the cluster has at most 4 .*Try cluster.max_workers=8 or train.workers=4"
    ):
        cost.estimate(sd14("--train.workers=8"), "runpod", 1000)
    with pytest.raises(cost.Refused, match="usd_per_hour_max=1"):
        cost.estimate(sd14("--cluster.usd_per_hour_max=1"), "runpod", 1000)


def test_mirror_images_take_as_long_again_to_encode_and_as_many_bytes() -> None:
    plain, mirrored = (cost.estimate(sd14(*more), "runpod", 10**6) for more in ((), ("--encode.mirrored=true",)))
    assert mirrored.hours["encode"] == pytest.approx(2 * plain.hours["encode"])
    assert mirrored.network_bytes - plain.network_bytes == pytest.approx(10**6 * 2**16)


@limits(max_examples=40, deadline=None)
@given(
    images=st.integers(64, 10**6),
    works=st.integers(1, 10**6),
    workers=st.integers(1, 4),
    cloud=st.sampled_from(["runpod", "gke"]),
)
def test_more_costs_more(images: int, works: int, workers: int, cloud: cost.Cloud) -> None:
    less, more = (SD14.model_copy(update={"train": SD14.train.model_copy(update={"images": factor * images, "workers": workers})})
                  for factor in (1, 2))  # fmt: skip
    less, more = cost.estimate(less, cloud, works), cost.estimate(more, cloud, 2 * works)
    assert more.usd > less.usd > 0
    assert more.network_bytes >= less.network_bytes
    assert less.total_hours == pytest.approx(sum(less.hours.values()))


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_jobs.plan", "--config", "configs/sd14.yaml", *arguments]
    return subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)


def test_the_command() -> None:
    for cloud in ("runpod", "gke"):
        said = plan("--on", cloud)
        assert said.returncode == 0, said.stderr
        for word in ("node", "hours", "dollars", "network", "rests on"):
            assert word in said.stdout
    refused = plan("--on", "runpod", "--train.workers=4")
    assert (refused.returncode, "GB through a node's link" in refused.stderr) == (1, True)
    assert plan("--on", "runpod", "--train.workers=4", "--force").returncode == 0
    assert "above cluster.usd_total_max=0.01: it would be cut off there" in plan("--cluster.usd_total_max=0.01").stdout
    assert "0.01: on GKE nothing cuts it off" in plan("--on", "gke", "--cluster.usd_total_max=0.01").stdout
