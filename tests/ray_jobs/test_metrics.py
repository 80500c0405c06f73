"""What a run reports reaches Prometheus, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from ray_jobs._metrics import GAUGE, METRICS, exporter

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "training.json"


def asked() -> list[tuple[str, str]]:
    """(gauge, metric or pattern of it) of every query of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found = [re.fullmatch(r'(\w+)\{run=~"\$run",metric=~?"([^"]+)"\}', query) for query in queries]
    assert all(found), queries
    return [(match[1], match[2]) for match in found if match]


def test_the_dashboard_names_what_is_declared() -> None:
    samples = {"loss_t[0-9]+_[0-9]+": "loss_t000_249"}
    names = [samples.get(pattern, pattern) for pattern in METRICS]
    for gauge, pattern in asked():
        assert gauge == f"ray_{GAUGE}"
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    assert len(asked()) == len(METRICS)


def test_what_the_loop_logs_is_declared(tiny_base: Path, tmp_path: Path) -> None:
    import torch

    from momalisa.config import Diffusion, Train
    from momalisa.storage import Store
    from momalisa.training.cache import LatentCache
    from momalisa.training.loop import Events, Run, Trainer

    moments, names = torch.randn((6, 8, 4, 4)).half(), [f"w{i}" for i in range(6)]
    cache = LatentCache(names, names, list(moments), torch.ones((6, 77), dtype=torch.int64))
    train = Train(images=8, batch=4, workers=1, precision="fp32", checkpoint_every_images=100)
    heard: dict[str, float] = {}
    run = Run("r", train, Diffusion(model=str(tiny_base)), cache, Store(str(tmp_path)))
    Trainer(run, Events(logged=heard.update)).train()
    assert {"loss", "images_seen", "images_per_s", "learning_rate", "gradient_norm"} <= set(heard)
    unknown = [name for name in heard if not any(re.fullmatch(pattern, name) for pattern in METRICS)]
    assert not unknown


@pytest.mark.integration
def test_a_worker_s_metrics_are_scraped(ray_cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self) -> None:
            self.heard = exporter("demo-1")

        def log(self) -> None:
            self.heard({"loss": 0.25, "images_seen": 32})

    worker = Worker.remote()
    ray.get(worker.log.remote())
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, text = time.monotonic() + 60, ""
    while f"ray_{GAUGE}{{" not in text and time.monotonic() < deadline:
        time.sleep(0.5)
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"ray_{GAUGE}{{")]
    (loss,) = [line for line in lines if 'metric="loss"' in line]
    assert 'run="demo-1"' in loss
    assert float(loss.rsplit(" ", 1)[1]) == 0.25
