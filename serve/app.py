"""The Ray Serve application: an HTTP layer in front of generator replicas.

    serve deploy serve/config.yaml        on a running cluster
    serve run serve.app:build             here and now, with configs/demo.yaml

This file keeps annotations as classes (no `from __future__ import annotations`): Serve reads `ServeArgs` off `build`.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from momalisa import config
from serve.answers import RETRY_AFTER_S
from serve.api import create_app
from serve.task import STORE_WITHIN_S, Ballot, Event, Failed, GenerationTask, Rejected, State, Unavailable

ANSWER_WITHIN_S = 5.0
HOME = "MOMALISA_HOME"


class ServeArgs(BaseModel):
    """`args` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    config: str = "configs/demo.yaml"
    """The settings file; a relative path starts at $MOMALISA_HOME, or else at the repository's root."""
    overrides: list[str] = []
    """Settings on top, as on a command line: `--root=/data/moma`, `--serve.steps=30`."""
    release: str = ""
    """Any text. `serve deploy` starts replicas anew only when something in `args` has changed. With `serve.watch_s` above 0
    they find a new refs/best by themselves."""


class ReplicasBackend:
    """The HTTP layer's view of the generator replicas, over a Serve handle."""

    def __init__(self, generator: DeploymentHandle[Any]) -> None:
        self._generator = generator

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        """Closing it cancels the replica's work."""
        events: Any = self._generator.options(stream=True).generate.remote(task)
        try:
            async for event in events:
                yield event
        except BackPressureError:
            yield Rejected(RETRY_AFTER_S, "every generator's line is full")
        except (RayError, RayServeException):
            yield Failed("the generator was lost while it painted; try again", retry=True)
        finally:
            events.cancel()

    async def state(self) -> State:
        try:
            state: State = await asyncio.wait_for(self._generator.state.remote(), ANSWER_WITHIN_S)
        except (TimeoutError, RayError, RayServeException) as error:
            raise Unavailable(f"no generator answered within {ANSWER_WITHIN_S:.0f} s; it may be starting") from error
        return state

    async def adapters(self) -> list[str]:
        try:
            names: list[str] = await asyncio.wait_for(self._generator.adapters.remote(), STORE_WITHIN_S)
        except (TimeoutError, RayError, RayServeException, Unavailable) as error:
            raise Unavailable("the adapters cannot be listed at present; try again") from error
        return names

    async def vote(self, ballot: Ballot) -> None:
        try:
            await asyncio.wait_for(self._generator.vote.remote(ballot), ANSWER_WITHIN_S)
        except (TimeoutError, RayError, RayServeException, Unavailable) as error:
            raise Unavailable("the vote could not be kept; try again") from error

    async def metrics(self) -> list[tuple[str, str]]:
        try:
            texts = await self._generator.broadcast("metrics").results_async(timeout_s=ANSWER_WITHIN_S)
        except (TimeoutError, RayError, RayServeException) as error:
            raise Unavailable(f"not every generator answered within {ANSWER_WITHIN_S:.0f} s") from error
        return [one for replica in texts for one in replica]


@ray_serve.ingress()
class Http:
    """The ingress: one light process, no model."""

    def __init__(self, generator: DeploymentHandle[Any], limits: config.Serve) -> None:
        self._backend, self._limits = ReplicasBackend(generator), limits

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self._backend, self._limits)


def load_settings(args: ServeArgs) -> config.Settings:
    """The settings with an absolute root. Raises ConfigError."""
    home = Path(os.environ.get(HOME) or Path(__file__).resolve().parents[1])
    settings = config.from_file(str(home / args.config), args.overrides)
    root = settings.root if "://" in settings.root else str(home / settings.root)
    files = {name: str(home / path) for name in ("keys", "forbidden_words") if (path := getattr(settings.serve, name))}
    return settings.model_copy(update={"root": root, "serve": settings.serve.model_copy(update=files)})


def build(args: ServeArgs) -> ray_serve.Application:
    """Every replica serves what refs/best names. Raises ConfigError or NoCheckpoint."""
    return application(load_settings(args))


def application(settings: config.Settings, gpus: float = 0.0) -> ray_serve.Application:
    """The same of settings; `gpus` of a replica, where no Serve config file says how many. Raises NoCheckpoint."""
    from momalisa.checkpoint import read_best
    from momalisa.storage import Store
    from serve.replica import Generator

    read_best(Store(settings.root))  # nothing promoted is the deployment's failure, not the replicas'
    limits = settings.serve
    generator = ray_serve.deployment(
        name="Generator",
        # The line is the replica's own: Serve hands over more than it can hold, and the replica says when it is full.
        max_ongoing_requests=limits.max_waiting_rows + 2 * limits.max_rows,
        max_queued_requests=limits.max_waiting_rows,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": gpus},
    )(Generator)
    http = ray_serve.deployment(
        name="Http", max_ongoing_requests=1000, max_queued_requests=1000, ray_actor_options={"num_cpus": 0.1}
    )(Http)
    bound: ray_serve.Application = http.bind(generator.bind(settings), limits)
    return bound
