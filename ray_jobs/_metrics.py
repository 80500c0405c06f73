"""What a run reports, as Ray metrics: Prometheus scrapes them from every node, deploy/grafana/training.json draws them.

One gauge, `ray_momalisa_train`, with a label for the run and one for what is measured, so that whatever the loop reports
(loss, learning rate, gradient norm, images/s, loss by timestep) is there without being listed here.
"""

from __future__ import annotations

from collections.abc import Callable

GAUGE = "momalisa_train"  # Ray puts `ray_` before it
METRICS = {  # patterns of what the loop may report
    "loss": "mean training loss since the last entry",
    "loss_t[0-9]+_[0-9]+": "the same by range of timesteps",
    "images_seen": "how far the run is",
    "images_per_s": "over all workers",
    "learning_rate": "now",
    "gradient_norm": "of the last step, before clipping",
    "mfu": "share of the accelerator's peak that the model's arithmetic uses; where the peak is known",
    "data_wait_fraction": "share of the time that steps waited for data",
    "peak_memory_gib": "most memory held so far, of the accelerator or of the process",
}


def exporter(run: str) -> Callable[[dict[str, float]], None]:
    """A listener for a run's metrics."""
    from ray.util.metrics import Gauge

    gauge = Gauge(GAUGE, description="What the training loop reports, by metric.", tag_keys=("run", "metric"))
    gauge.set_default_tags({"run": run})

    def heard(metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            gauge.set(float(value), tags={"metric": name})

    return heard
