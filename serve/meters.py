"""Every metric of the service, for Prometheus. A process has one set of them; the HTTP layer gathers all.

Nothing here knows a prompt, a key's secret or a visitor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Meters:
    """A generator's."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.waiting = Gauge("momalisa_waiting_pictures", "Pictures in line", registry=own)
        self.pending_row_steps = Gauge("momalisa_pending_row_steps", "Accepted work that is not done", registry=own)
        self.tick_rows = Histogram(
            "momalisa_tick_rows", "Rows of the UNet's batch in a tick", buckets=(1, 2, 4, 8, 12, 16, 24, 32, 64), registry=own
        )
        self.tick_s = Histogram("momalisa_tick_seconds", "Time of a tick", buckets=SECONDS, registry=own)
        self.first_preview_s = Histogram(
            "momalisa_first_preview_seconds", "From acceptance to the first preview", buckets=SECONDS, registry=own
        )
        self.pictures = Counter("momalisa_pictures", "Pictures painted", registry=own)
        self.refused = Counter("momalisa_refused", "Requests that were not accepted", ["reason"], registry=own)
        self.outcomes = Counter("momalisa_outcomes", "Accepted requests by how they ended", ["outcome"], registry=own)
        self.filtered = Counter("momalisa_filtered", "Pictures withheld by a check", ["what"], registry=own)
        self.rollbacks = Counter("momalisa_rollbacks", "Checkpoints that failed their trial", registry=own)
        self.rejected = Gauge("momalisa_best_not_served", "1 while refs/best is not what is served", registry=own)
        self.checkpoint = Gauge("momalisa_checkpoint", "1 for a served checkpoint", ["checkpoint", "role"], registry=own)

    def served(self, checkpoint: str, trial: str) -> None:
        self.checkpoint.clear()
        self.checkpoint.labels(checkpoint, "main").set(1)
        if trial:
            self.checkpoint.labels(trial, "trial").set(1)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


class HttpMeters:
    """The HTTP layer's."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("momalisa_http_requests", "Requests answered", ["route", "status"], registry=own)
        self.latency_s = Histogram(
            "momalisa_http_seconds", "Until an answer has been sent", ["route"], buckets=SECONDS, registry=own
        )
        self.refused_prompts = Counter("momalisa_filtered_prompts", "Prompts refused by a check", registry=own)
        self.votes = Counter("momalisa_votes", "Votes between two checkpoints", registry=own)
        self.jobs = Gauge("momalisa_jobs", "Jobs that are kept", registry=own)


class _Gathered:
    """A registry made of the texts of several processes, each with its name as a label."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts:
            for family in text_string_to_metric_families(text):
                into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    into.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
        yield from families.values()


def gathered(own: HttpMeters, texts: Sequence[tuple[str, str]]) -> bytes:
    """Prometheus' text of the HTTP layer and of every replica."""
    registry = CollectorRegistry()
    registry.register(_Gathered(texts))
    return generate_latest(own.registry) + generate_latest(registry)
