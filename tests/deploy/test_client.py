"""The client: every status is an error that says what to do; nothing is created twice; the key is in no message."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import httpx
import pytest

from deploy.runpod import client as clients
from deploy.runpod.client import BadRequest, Client, NoCapacity, NoKey, NoMoney, NotAllowed, Unreachable
from tests.deploy.fake_runpod import DOCUMENT, KEY, FakeRunpod, Fault

BODY = {
    "name": "moma-worker-1", "image": "image:1", "gpu": {"id": "NVIDIA GeForce RTX 4090", "count": 1}, "ports": ["2222/tcp"],
    "disk": 20, "env": {}, "globalNetworking": True,
}  # fmt: skip


@pytest.fixture
def client(runpod: FakeRunpod) -> Client:
    return dataclasses.replace(Client.from_environment(patience_s=60.0), sleep=lambda seconds: time.sleep(min(seconds, 0.01)))


def test_a_pods_life(client: Client, runpod: FakeRunpod) -> None:
    made = client.create(BODY)
    assert (made["status"], client.pod(made["id"])["status"]) == ("PROVISIONING", "RUNNING")
    assert [pod["name"] for pod in client.pods()] == ["moma-worker-1"]
    client.stop(made["id"])
    assert client.pod(made["id"])["status"] == "EXITED"
    client.terminate(made["id"])
    client.terminate(made["id"])
    assert (client.pods(), client.pod(made["id"])) == ([], None)


@pytest.mark.skipif(not DOCUMENT.is_file(), reason=f"RunPod's OpenAPI document is not at {DOCUMENT}: bodies are not validated")
def test_what_is_sent_is_what_runpods_document_says(client: Client, runpod: FakeRunpod) -> None:
    with pytest.raises(BadRequest, match="422"):
        client.create({**BODY, "gpuTypeId": "v1 called it so"})
    assert any("gpuTypeId" in violation for violation in runpod.violations)
    runpod.violations.clear()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 0])
def test_what_may_pass_is_asked_again(client: Client, runpod: FakeRunpod, status: int) -> None:
    runpod.faults = [Fault("GET", "/v2/pods", status, times=3)]
    assert client.pods() == []
    assert len(runpod.asked) == 4


def test_it_waits_as_long_as_it_is_told(runpod: FakeRunpod) -> None:
    waits: list[float] = []
    patient = dataclasses.replace(Client.from_environment(), sleep=waits.append)
    runpod.faults = [Fault("GET", "/v2/pods", 429, times=2, retry_after=12)]
    patient.pods()
    assert waits == [12.0, 12.0]


def test_waits_grow_and_the_cause_is_told_in_the_end(runpod: FakeRunpod, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(clients, "time", SimpleNamespace(monotonic=lambda: sum(waits)))
    patient = dataclasses.replace(Client.from_environment(60), sleep=waits.append)
    runpod.down = True
    with pytest.raises(Unreachable, match=r"RunPod did not answer for 60 s \(503 Service Unavailable: upstream is down\)"):
        patient.pods()
    assert 60 < sum(waits) < 60 + 15
    assert len(runpod.asked) == len(waits) < 20
    assert max(waits) > 10 * waits[0]


@pytest.mark.parametrize("status", [500, 0])
def test_an_answer_that_was_lost_makes_no_second_pod(client: Client, runpod: FakeRunpod, status: int) -> None:
    runpod.faults = [Fault("POST", "/v2/pods", status, after=True)]
    assert client.create(BODY)["name"] == "moma-worker-1"
    assert runpod.made == ["moma-worker-1"]


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (Fault("POST", "/v2/pods", 400, detail="no instances"), NoCapacity, "no instances"),
        (Fault("POST", "/v2/pods", 403, detail="access denied"), NotAllowed, "access denied"),
        (Fault("POST", "/v2/pods", 402, detail="insufficient"), NoMoney, "add credit"),
        (Fault("POST", "/v2/pods", 400, detail="GPU quota exceeded"), NoMoney, "ask RunPod to raise it"),
        (Fault("POST", "/v2/pods", 422, detail="disk"), BadRequest, "refused the pod"),
        (Fault("POST", "/v2/pods", 401), NoKey, "does not know this RUNPOD_API_KEY"),
        (Fault("GET", "/v2/pods", 403), NoKey, "read and write access"),
    ],
)
def test_a_refusal_says_the_way_out(client: Client, runpod: FakeRunpod, fault: Fault, error: type[Exception], said: str) -> None:
    runpod.faults = [fault]
    with pytest.raises(error, match=said):
        client.create(BODY)
    assert runpod.made == []


def test_a_key_is_needed_and_never_told(client: Client, runpod: FakeRunpod, monkeypatch: pytest.MonkeyPatch) -> None:
    runpod.faults = [Fault("GET", "/v2/pods", 422, detail=f"the header was 'Bearer {KEY}'")]
    with pytest.raises(BadRequest) as caught:
        client.pods()
    assert KEY not in f"{caught.value}{caught.value!r}{client!r}"
    with pytest.raises(NoKey, match="make a new one"):
        dataclasses.replace(client, key="wrong").pods()
    monkeypatch.setenv("RUNPOD_ACCOUNT_KEY", "the head's")
    assert Client.from_environment().key == "the head's"  # beside it RunPod puts one that may do little
    monkeypatch.delenv("RUNPOD_ACCOUNT_KEY")
    for value in ("", "  "):
        monkeypatch.setenv("RUNPOD_API_KEY", value)
        with pytest.raises(NoKey, match="is not set"):
            Client.from_environment()


def test_a_body_that_is_no_problem_document(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx, "request", lambda *_, **__: httpx.Response(409, text="<html>" + "x" * 1000))
    with pytest.raises(BadRequest, match="<html>x") as caught:
        client._ask("PATCH", "/v2/pods")
    assert len(str(caught.value)) < 300


def test_the_end_of_a_pods_log(client: Client, runpod: FakeRunpod) -> None:
    runpod.unpullable = {"image:1"}
    made = client.create(BODY)
    assert client.last_words(made["id"]) == "error pulling image image:1: manifest unknown"
    assert client.last_words("absent") == ""
    runpod.pods[made["id"]]["words"] = f"login with {KEY} failed"
    assert client.last_words(made["id"]) == "login with *** failed"
