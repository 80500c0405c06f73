"""What is measured, what the dashboard asks for, and what is never logged."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.meters import HttpMeters, Meters, gathered
from serve.pace import Pace
from serve.scaling import ByPendingWork

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "serving.json"
PATH = "/v1/images/generations"


def exported() -> set[str]:
    """Every name that Prometheus will know, with its suffixes."""
    names = set()
    for registry in (Meters().registry, HttpMeters().registry):
        for family in registry.collect():
            endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            names |= {family.name + ending for ending in endings}
    return names


def test_the_dashboard_asks_for_what_there_is_and_shows_all_of_it() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"momalisa_\w+", target["expr"])
    }
    assert asked <= exported()
    families = {re.sub("_(total|bucket|sum|count)$", "", name) for name in exported()}
    assert {re.sub("_(total|bucket|sum|count)$", "", name) for name in asked} == families


async def test_metrics_tell_of_pictures_routes_and_replicas(client: httpx.AsyncClient) -> None:
    assert (await client.post(PATH, json={"prompt": "x", "stream": True, "partial_images": 2, "steps": 6})).status_code == 200
    assert (await client.post(PATH, json={"prompt": ""})).status_code == 400
    text = (await client.get("/metrics")).text
    samples = {
        (sample.name, sample.labels.get("route"), sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["momalisa_http_requests_total", PATH, "200"] == 1
    assert samples["momalisa_http_requests_total", PATH, "400"] == 1
    assert samples["momalisa_http_seconds_count", PATH, None] == 2
    assert samples["momalisa_pictures_total", None, None] >= 1
    assert samples["momalisa_tick_rows_count", None, None] >= 6
    assert samples["momalisa_first_preview_seconds_count", None, None] >= 1
    assert 'momalisa_checkpoint{checkpoint="tiny-64",replica="' in text


def test_replicas_are_told_apart() -> None:
    one, other = Meters(), Meters()
    one.pictures.inc(3)
    other.pictures.inc(4)
    text = gathered(HttpMeters(), [("a", one.text()), ("b", other.text())]).decode()
    assert 'momalisa_pictures_total{replica="a"} 3.0' in text
    assert 'momalisa_pictures_total{replica="b"} 4.0' in text
    assert text.count("# TYPE momalisa_pictures_total counter") == 1


async def test_a_request_is_one_line_without_its_prompt(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answer = await client.post(PATH, json={"prompt": "a secret wish"}, headers={"X-Request-ID": "visit-7"})
        odd = await client.post(PATH, json={"prompt": "a secret wish"}, headers={"X-Request-ID": "x" * 100})
    lines = [json.loads(record.message) for record in caplog.records if record.name == "serve.requests"]
    assert len(lines) == 2
    assert lines[0]["request_id"] == answer.headers["X-Request-ID"] == "visit-7"
    assert odd.headers["X-Request-ID"] != "x" * 100
    assert (lines[0]["route"], lines[0]["status"]) == (PATH, 200)
    assert "secret" not in caplog.text


def test_waiting_times_follow_the_measured_pace() -> None:
    pace = Pace()
    for _ in range(50):
        pace.tick(0.2, 10)
    assert pace.row_step_s == pytest.approx(0.02)
    assert pace.eta_s(100) == pytest.approx(2.0)
    for _ in range(100):
        pace.tick(0.1, 10)
    assert pace.row_step_s == pytest.approx(0.01, rel=0.02)
    before = pace.row_step_s
    pace.tick(0.1, 0)  # decoding is part of the work
    assert pace.row_step_s > before


class Context:
    def __init__(self, pending: dict[str, float], requests: float = 0) -> None:
        self.aggregated_metrics, self.total_num_requests = {"pending_s": pending} if pending else {}, requests


@pytest.mark.parametrize(
    ("pending", "requests", "replicas"),
    [({}, 0, 0), ({}, 3, 1), ({"a": 0.0}, 0, 0), ({"a": 9.0}, 1, 1), ({"a": 11.0}, 5, 2), ({"a": 30.0, "b": 25.0}, 9, 6)],
)
def test_replicas_follow_the_work_that_waits(pending: dict[str, float], requests: float, replicas: int) -> None:
    assert ByPendingWork(10.0)(Context(pending, requests))[0] == replicas
