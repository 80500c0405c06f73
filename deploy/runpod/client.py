"""RunPod's REST API v2: pods and GPU types. https://docs.runpod.io/api-reference-v2

The key comes from the environment alone and goes into one header; no message or repr holds it. RunPod puts a RUNPOD_API_KEY
of its own into each pod, which may do little but delete that pod: a head has the account's as RUNPOD_ACCOUNT_KEY.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from momalisa.redaction import redact

KEY = "RUNPOD_API_KEY"
ACCOUNT_KEY = "RUNPOD_ACCOUNT_KEY"
URL = "MOMALISA_RUNPOD_URL"
DEFAULT_URL = "https://api.runpod.io"
GONE = {"TERMINATED"}
FAILED = {"EXITED", "ERROR"}
Pod = dict[str, Any]


class RunpodError(Exception):
    """An answer that is no success; `status` is HTTP's, 0 where there was none."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(redact(detail))
        self.status = status


class NoKey(RunpodError):
    """No key, a wrong one, or one that may not do this."""


class NoCapacity(RunpodError):
    """This GPU type cannot be placed here now; another one may."""


class NotAllowed(NoCapacity):
    """The key may not create pods, or the account may not use this GPU type here: RunPod does not say which."""


class NoMoney(RunpodError):
    """The account's balance or quota is used up: no other GPU type will do."""


class BadRequest(RunpodError):
    """The request itself is wrong: the same everywhere."""


class Unreachable(RunpodError):
    """No answer, or only 429 and 5xx, for as long as we were patient."""


@dataclass(frozen=True)
class Client:
    """Asks patiently: 429 (as long as Retry-After says), 5xx and lost connections are asked again for `patience_s`."""

    url: str
    key: str
    patience_s: float = 120.0
    timeout_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    @classmethod
    def from_environment(cls, patience_s: float = 120.0) -> Client:
        """Raises NoKey where neither $RUNPOD_ACCOUNT_KEY nor $RUNPOD_API_KEY is set."""
        key = (os.environ.get(ACCOUNT_KEY) or os.environ.get(KEY, "")).strip()
        if not key:
            raise NoKey(0, f"{KEY} is not set; make a key at https://console.runpod.io/user/settings and export it")
        return cls(os.environ.get(URL, DEFAULT_URL).rstrip("/"), key, patience_s)

    def pods(self) -> list[Pod]:
        """Every pod of the account that is not gone."""
        return [pod for pod in self._ask("GET", "/v2/pods").json()["pods"] if pod["status"] not in GONE]

    def pod(self, pod_id: str) -> Pod | None:
        """None: there is no such pod (any more)."""
        with contextlib.suppress(NotFound):
            pod: Pod = self._ask("GET", f"/v2/pods/{pod_id}").json()
            return None if pod["status"] in GONE else pod
        return None

    def stop(self, pod_id: str) -> None:
        """Release the GPU, keep the disk."""
        self._ask("POST", f"/v2/pods/{pod_id}/action", {"action": "stop"})

    def terminate(self, pod_id: str) -> None:
        """A pod that is gone already is no error."""
        with contextlib.suppress(NotFound):
            self._ask("DELETE", f"/v2/pods/{pod_id}")

    def create(self, body: dict[str, Any]) -> Pod:
        """Create a pod whose name nobody else has, once: after an answer that was lost it is looked for by that name.

        Raises NoCapacity, NoMoney, BadRequest, NoKey, Unreachable.
        """
        for wait_s in self._waits():
            if (there := self.named(body["name"])) is not None:
                return there
            try:
                pod: Pod = self._send("POST", "/v2/pods", body).json()
                return pod
            except Later as later:
                self.sleep(max(wait_s, later.after_s))
                last = later
        if (there := self.named(body["name"])) is not None:
            return there
        raise self._gave_up("POST /v2/pods", last)

    def named(self, name: str) -> Pod | None:
        return next((pod for pod in self.pods() if pod["name"] == name), None)

    def gpu_types(self) -> dict[str, dict[str, Any]]:
        """{id: GPU type, with its list prices}."""
        return {gpu["id"]: gpu for gpu in self._ask("GET", "/v2/catalog/gpus").json()["gpus"]}

    def last_words(self, pod_id: str, lines: int = 3) -> str:
        """The end of a pod's system log, where a failed image pull is told; empty if it cannot be had."""
        url = f"{self.url}/v2/pods/{pod_id}/logs"
        found: list[str] = []
        deadline = time.monotonic() + 3  # the stream does not end by itself
        with (
            contextlib.suppress(httpx.HTTPError, ValueError, KeyError),
            httpx.stream("GET", url, params={"source": "system", "tail": lines}, headers=self._headers, timeout=2) as stream,
        ):
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    found.append(str(json.loads(line[5:])["line"]))
                if len(found) >= lines or time.monotonic() > deadline:
                    break
        return redact(" / ".join(found))

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def _waits(self) -> Iterator[float]:
        """Seconds between tries: doubled each time, up to 15, some of it by chance, until `patience_s` have passed."""
        deadline, wait_s = time.monotonic() + self.patience_s, 0.5
        while True:
            yield wait_s * random.uniform(0.5, 1.0)
            if time.monotonic() > deadline:
                return
            wait_s = min(2 * wait_s, 15.0)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """Of what may be asked twice."""
        for wait_s in self._waits():
            try:
                return self._send(method, path, body)
            except Later as later:
                self.sleep(max(wait_s, later.after_s))
                last = later
        raise self._gave_up(f"{method} {path}", last)

    def _gave_up(self, what: str, last: Later) -> Unreachable:
        return Unreachable(last.status, f"{what}: RunPod did not answer for {self.patience_s:.0f} s ({last}); try again later")

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """One request. Raises Later for what is worth another try, and otherwise what its status means."""
        try:
            answer = httpx.request(method, f"{self.url}{path}", json=body, headers=self._headers, timeout=self.timeout_s)
        except httpx.HTTPError as error:
            raise Later(0, f"{type(error).__name__}: {error}") from None
        if answer.is_success:
            return answer
        if answer.status_code == 429 or answer.status_code >= 500:
            raise Later(answer.status_code, problem(answer), retry_after_s(answer))
        raise refusal(method, path, answer)


class NotFound(RunpodError):
    pass


class Later(RunpodError):
    """Worth another try, after `after_s` at the soonest."""

    def __init__(self, status: int, detail: str, after_s: float = 0.0) -> None:
        super().__init__(status, detail)
        self.after_s = after_s


def retry_after_s(answer: httpx.Response) -> float:
    try:
        return min(float(answer.headers.get("Retry-After", 0)), 60.0)
    except ValueError:
        return 0.0


def problem(answer: httpx.Response) -> str:
    """What an application/problem+json body says, or the beginning of any other."""
    try:
        said = answer.json()
        details = "; ".join([str(said["detail"]), *map(str, said.get("errors", []))])
        return f"{answer.status_code} {said['title']}: {details}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code}: {answer.text[:200]!r}"


def refusal(method: str, path: str, answer: httpx.Response) -> RunpodError:
    """The error that a status is, with the way out. A 400 to a create is a rule or no capacity: RunPod does not say which."""
    said, status = problem(answer), answer.status_code
    if status == 401:
        return NoKey(status, f"RunPod does not know this {KEY} ({said}); make a new one in its console and export it")
    if status == 402:
        return NoMoney(status, f"the RunPod account has no balance left ({said}); add credit in its console")
    if status == 404 and not (method == "POST" and path == "/v2/pods"):
        return NotFound(status, f"{method} {path}: {said}")
    if method == "POST" and path == "/v2/pods":
        if any(word in said.lower() for word in ("quota", "spend limit", "spending limit")):
            return NoMoney(status, f"the RunPod account's quota is used up ({said}); ask RunPod to raise it or give pods back")
        if status in (400, 403):
            return (NoCapacity if status == 400 else NotAllowed)(status, said)
        return BadRequest(status, f"RunPod refused the pod ({said})")
    if status == 403:
        return NoKey(status, f"this {KEY} may not {method} {path} ({said}); give it read and write access to pods")
    return BadRequest(status, f"{method} {path}: {said}")
