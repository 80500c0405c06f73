"""The generator: the promoted checkpoint on one accelerator (or a few CPU cores), the line in front of it, the watch."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ray
import torch

from momalisa import checkpoint, votes
from momalisa.config import Diffusion, Settings
from momalisa.engine import Engine
from momalisa.storage import Store
from serve import checks, rehearsal
from serve.loaded_checkpoint import LoadedCheckpoint
from serve.lookup import Lookup
from serve.meters import Meters
from serve.room import Room
from serve.scheduler import Scheduler
from serve.task import Ballot, Event, GenerationTask, State, Unavailable
from serve.watch import Watch

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device() -> str:
    """`cuda` where Ray gave this process a GPU. Ray hides none from those that asked for none: what they see is another's."""
    if ray.is_initialized() and ray.get_gpu_ids():
        return "cuda"
    if torch.cuda.is_available():
        logger.warning("there is a GPU here, and Ray gave this replica none: set num_gpus in its ray_actor_options")
    return "cpu"


class Generator:
    """Exists only when it can paint: weights verified against their manifest, pictures made to warm up."""

    def __init__(self, settings: Settings, path: str | None = None) -> None:
        """`path` is a checkpoint's, below the root; None: refs/best.

        Raises NoCheckpoint, or ValueError for a file that was changed.
        """
        self._settings, self._store = settings, Store(settings.root)
        self._device = device()
        self._room = Room(self._device)
        if self._device == "cpu":
            torch.set_num_threads(settings.serve.threads or os.cpu_count() or 1)  # Ray says 1
        path = path or checkpoint.read_best(self._store).path
        self.meters, self._lookup = Meters(), Lookup(settings.root)
        self._name = uuid.uuid4().hex[:8]
        self._challenger_problem = self._told = ""
        self._bases: dict[str, Diffusion] = {}  # by the paths of checkpoints that were loaded
        self._scheduler = Scheduler(self._load(path), settings.serve, self.meters, self._challenger(settings.serve.challenger))
        every_s = settings.serve.watch_s
        self._watch = Watch(self._store, self._load, self._scheduler, every_s) if every_s else None

    async def generate(self, task: GenerationTask) -> AsyncGenerator[Event, None]:
        """Events up to an outcome; closing it frees the rows. Does not raise."""
        if refusal := await self._lookup.refusal(task.adapter, self._base):
            yield refusal
            return
        async for event in self._scheduler.generate(task):
            yield event

    async def state(self) -> State:
        """What is served; answers while painting too."""
        state = self._scheduler.state()
        problem = (self._watch.problem if self._watch else "") or self._challenger_problem or state.problem
        if problem != self._told:  # the whole of it is for the log alone
            self._told = problem
            logger.warning("what is served is not what is wanted: %s", problem or "it is again")
        return replace(state, problem=problem)

    async def adapters(self) -> list[str]:
        """Those for the base of what is served. Raises Unavailable where the store does not answer."""
        return await self._lookup.adapters(self._base)

    async def vote(self, ballot: Ballot) -> None:
        """One more file below votes/. Raises Unavailable where the store does not take it."""
        vote = votes.Vote(ballot.winner, ballot.loser)
        try:
            await asyncio.to_thread(votes.cast, self._store, [vote], **ballot.about)
        except Exception as error:
            logger.error("a vote was not kept: %s", error)
            raise Unavailable("the vote could not be kept; try again") from None

    async def metrics(self) -> list[tuple[str, str]]:
        """[(name of this process, Prometheus text)]."""
        self.meters.rejected.set(bool(self._watch and self._watch.problem))
        return [(self._name, self.meters.text())]

    def check_health(self) -> None:
        """Serve's health check. Raises where nothing can be painted any more: the replica is then replaced."""
        self._scheduler.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's autoscaling: what `serve.scaling` decides by."""
        return self._scheduler.load()

    def close(self) -> None:
        """Finish what was accepted, then end the threads."""
        if self._watch:
            self._watch.close()
        self._scheduler.close()
        self._lookup.close()

    @property
    def _base(self) -> Diffusion:
        return self._bases[self._scheduler.serving()[0]]

    def _challenger(self, name: str) -> LoadedCheckpoint | None:
        """None where there is none, or it cannot be served: the state then says why, and pictures are drawn all the same."""
        try:
            return self._load(checkpoint.find(self._store, name).path) if name else None
        except Exception as error:
            self._challenger_problem = f"serve.challenger={name} cannot be served: {error}"
            logger.error("%s", self._challenger_problem)
            return None

    def _load(self, path: str) -> LoadedCheckpoint:
        """Verified and warm. Raises NoCheckpoint, GenerationError for weights that paint nothing, or ValueError, also where
        the GPU has no room for another one.

        Done in a thread that ends: each thread that has run a parallel operation keeps its own OpenMP workers, and where there
        are more of them than processors libgomp's no longer spin at a barrier: the engine's small operations take twice as long.
        """
        with self._room.for_checkpoint(), ThreadPoolExecutor(1, "load") as thread:
            return thread.submit(self._loaded, path).result()

    def _loaded(self, path: str) -> LoadedCheckpoint:
        started, serve = time.monotonic(), self._settings.serve
        published = checkpoint.read(self._store, path)
        dtype = PRECISIONS[serve.precision]
        unet = checkpoint.load_unet(self._store, published, dtype if self._device == "cuda" else torch.float32)
        engine = Engine.load(
            published.diffusion,
            unet,
            self._device,
            dtype,
            serve.max_rows,
            max_adapters=serve.max_adapters,
            text_encoder=checkpoint.load_text_encoder(self._store, published, self._device, dtype),
            zero_terminal_snr=published.zero_terminal_snr,
            catalogue=self._lookup.catalogue,
        )
        compiled = not serve.compile or engine.compile([serve.size_px], serve.compile_cache or None)
        problem = "" if compiled else f"{published.id} is drawn without torch.compile"
        check = checks.picture_check(serve, published.diffusion, self._device)
        loaded = LoadedCheckpoint(engine, published.id, path, check, problem)
        self._bases[path] = published.diffusion
        rehearsal.warm_up(loaded, serve)
        logger.info("%s is ready on %s after %.1f s", published.id, self._device, time.monotonic() - started)
        logger.info("%s: the picture check is %s", published.id, checks.said(serve, check))
        return loaded
