"""The one place where noise is turned into art: a queue of requests, and a tick that takes them a step on.

Requests of any prompt, sampler, number of steps, scale, image or mask share a batch, and join it at the next tick.
What one request gets does not depend on its neighbours but for the last bits of float sums, and not even for those with
`reproducible`. The server, the evaluation pictures of training, and promotion all draw through here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from momalisa import attention
from momalisa.config import Diffusion
from momalisa.diffusion import ZERO_TERMINAL_SNR
from momalisa.engine.adapters import MAX_ADAPTERS, Adapted, Adapters
from momalisa.engine.batch import Batch, Model
from momalisa.engine.catalogue import Catalogue
from momalisa.engine.decoding import Decoder, Finished
from momalisa.engine.events import Broken, Done, Event, Preview
from momalisa.engine.preview import Projection
from momalisa.engine.request import Request
from momalisa.engine.runner import Runner
from momalisa.engine.samplers import Samplers, Table, scheduler_config
from momalisa.engine.texts import Texts
from momalisa.engine.trajectory import Trajectory
from momalisa.latents import Autoencoder, TextEncoder
from momalisa.precision import full_precision
from momalisa.storage import Store

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
MAX_ROWS = 32
DECODED_TOGETHER = 8
LOADING_S = 0.05  # a tick with nothing else to do waits so long for an adapter
PLACE_S = 5.0  # after waiting so long for a place among the loaded ones an adapter is made room for


@dataclass(frozen=True)
class Kind:
    """What requests must have in common to share a batch; a reproducible one has its own id, so shares with nobody."""

    size_px: int
    adapter: str | None
    alone: int | None


@dataclass(frozen=True, eq=False)
class Means:
    """What draws requests of a kind."""

    model: Model
    texts: Texts


@dataclass(eq=False)
class Lane:
    """Requests of one kind: those that wait, in order, and those that are drawn."""

    batch: Batch
    waiting: deque[Trajectory] = field(default_factory=deque)
    no_place_since: float | None = None  # seconds: its adapter has waited since then for a place among those that are loaded
    joined: int = 0  # the number of the tick in which one was let in last

    @property
    def trajectories(self) -> list[Trajectory]:
        return [*self.batch.trajectories, *self.waiting]


class Engine:
    """A UNet with its autoencoder, text encoder and noise schedule.

    One thread owns an engine: every method is called from there, and none of them waits for anything but the model.
    """

    def __init__(
        self,
        unet: Any,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        scheduler_config: dict[str, Any],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_rows: int = MAX_ROWS,
        adapters: Adapters | None = None,
    ) -> None:
        """`unet` is moved to `device`, and to `dtype` unless that is float32; its mode is kept.

        `max_rows`: UNet rows of a tick; a guided picture takes two. Raises ValueError where it is less than 2.
        """
        if max_rows < 2:
            raise ValueError(f"max_rows={max_rows} must be at least 2: a guided picture is two rows")
        self.device, self.dtype, self.max_rows = torch.device(device), dtype, max_rows
        _exact(self.device, dtype)
        self.unet = _placed(unet, self.device, dtype)
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self._samplers = Samplers(scheduler_config)
        self._zero_terminal_snr = Samplers(scheduler_config | ZERO_TERMINAL_SNR)
        self._texts = Texts(text_encoder, self.device, dtype)
        self._decoder = Decoder(autoencoder, self.device, DECODED_TOGETHER)
        self._runner = Runner(self.unet, self.device, dtype)
        self._adapters = adapters
        self._adapted: WeakKeyDictionary[Adapted, Means] = WeakKeyDictionary()
        self._projection: Projection | None = None
        self._step_done: torch.cuda.Event | None = None
        self._lanes: dict[Kind, Lane] = {}
        self._leaving: str | None = None  # an adapter whose lanes let nobody in: another one has waited too long for its place
        self._held: list[Event] = []
        self.stepped: list[int] = []  # the requests that the last tick took a step on
        self._full = False  # whether the last tick's step had no room for another guided picture
        self._next_id = self._ticks = 0

    @classmethod
    def load(
        cls,
        diffusion: Diffusion,
        unet: Any = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_rows: int = MAX_ROWS,
        store: Store | None = None,
        max_adapters: int = MAX_ADAPTERS,
        text_encoder: TextEncoder | None = None,
        zero_terminal_snr: bool = False,
        catalogue: Catalogue | None = None,
    ) -> Engine:
        """The base's pipeline around `unet` and `text_encoder` (default: the base's own), and adapters from `store`,
        or from a `catalogue` that several engines share.

        `text_encoder` is taken where and as it is; `zero_terminal_snr`: the UNet was trained so, and is
        sampled so. Raises ValueError where the base cannot be loaded.
        """
        from momalisa.checkpoint import load_base_unet

        autoencoder = Autoencoder.load(diffusion, device, dtype)
        text_encoder = text_encoder or TextEncoder.load(diffusion, device, dtype)
        unet = _placed(load_base_unet(diffusion) if unet is None else unet, torch.device(device), dtype)
        if catalogue is None and store is not None:
            catalogue = Catalogue(store)
        adapters = None if catalogue is None else Adapters(unet, text_encoder, catalogue, diffusion, max_adapters)
        config = scheduler_config(diffusion) | (ZERO_TERMINAL_SNR if zero_terminal_snr else {})
        return cls(unet, autoencoder, text_encoder, config, device, dtype, max_rows, adapters)

    def compile(self, sizes_px: Sequence[int], cache_dir: str | Path | None = None) -> bool:
        """Compile the UNet for pictures of these sizes, before the first request: minutes, or seconds from `cache_dir`.

        Adapters and other sizes are drawn without. On a GPU each shape becomes a CUDA graph. False where the compiler fails:
        the log says why, and everything is drawn without.
        """
        places = [size_px // self.autoencoder.factor for size_px in sizes_px]
        text = self._texts.embed([""])[0]
        try:
            self._runner.warm(self.max_rows, places, self.autoencoder.channels, text, cache_dir)
        except Exception:  # whatever Dynamo, Inductor, Triton and the compilers under them may raise
            logger.exception("the UNet is not compiled, so pictures are drawn without")
            return False
        return True

    def forget_texts(self) -> None:
        """Encode texts anew from now on: to be called when the weights of the text encoder have changed."""
        self._texts.forget()

    def close(self) -> None:
        """End the thread that loads adapters."""
        if self._adapters is not None:
            self._adapters.close()

    @property
    def rows(self) -> int:
        """UNet rows of the pictures that are being drawn."""
        return sum(lane.batch.rows for lane in self._lanes.values())

    @property
    def decoding(self) -> frozenset[int]:
        """Requests whose steps are done and whose picture is not: they take no rows."""
        return self._decoder.ids

    @property
    def pending_row_steps(self) -> int:
        """Rows times steps still to do, for those that wait too: the engine's load."""
        return sum(trajectory.row_steps for lane in self._lanes.values() for trajectory in lane.trajectories)

    @property
    def idle(self) -> bool:
        """Whether a tick would find nothing to do."""
        return not (self._lanes or self._held or len(self._decoder))

    def submit(self, request: Request) -> int:
        """Its id in events. It joins at the next tick with room. Raises ValueError for a request that cannot be.

        Nothing is waited for: its adapter is one that the catalogue has found.
        """
        table = self._check(request)
        self._next_id += 1
        kind = Kind(request.size_px, request.adapter, self._next_id if request.reproducible else None)
        lane = self._lanes.setdefault(kind, Lane(Batch(self.device)))
        lane.waiting.append(Trajectory(self._next_id, request, table))
        return self._next_id

    def cancel(self, id_: int) -> bool:
        """Its rows are not in the next tick. False where the id is unknown or has had its last event."""
        for kind, lane in self._lanes.items():
            if any(trajectory.id == id_ for trajectory in lane.trajectories):
                lane.waiting = deque(trajectory for trajectory in lane.waiting if trajectory.id != id_)
                lane.batch.drop([id_])
                if not lane.trajectories:
                    del self._lanes[kind]
                return True
        return self._decoder.cancel(id_)

    @torch.no_grad()
    def tick(self) -> list[Event]:
        """One step for the pictures of one kind, kinds taking turns, of which reproducible requests have one together; then some
        decoding. What there is to say about requests."""
        events, self._held, self.stepped, self._full = self._held, [], [], False
        self._ticks += 1
        self._make_places()
        chosen = self._choose(events)
        if self._step_done is not None:
            self._step_done.synchronize()  # one step at most waits on the GPU: what comes now is next
        if chosen is not None:
            kind, means = chosen
            lane = self._lanes.pop(kind)
            events += self._advance(lane, means, open_=kind.adapter is None or kind.adapter != self._leaving)
            if lane.trajectories:
                self._lanes[kind] = lane  # last in turn
            if kind.alone is not None:
                self._end_turn_of_alone()
        elif self._adapters is not None and self._lanes and not len(self._decoder):
            self._adapters.wait(LOADING_S)
        return events + self._decoder.poll(wait=not self._lanes, full=self._full)

    def generate(self, requests: Sequence[Request], on_step: OnStep | None = None) -> list[Image.Image]:
        """RGB pictures in the order of the requests, however many. `on_step(done, total)`: picture steps, after every tick.

        Raises ValueError for a request that cannot be, GenerationError where the result is not finite. Looks adapters up.
        """
        for request in requests:
            if request.adapter is not None and self._adapters is not None:
                self._adapters.catalogue.find(request.adapter)
            self._check(request)
        ids = [self.submit(request) for request in requests]
        total = sum(request.steps - request.start for request in requests)
        pictures: dict[int, Image.Image] = {}
        others: list[Event] = []
        while len(pictures) < len(ids):
            for event in self.tick():
                if event.id not in ids:
                    others.append(event)
                elif isinstance(event, Done):
                    pictures[event.id] = event.picture
                elif isinstance(event, Broken):
                    self._abandon(ids)
                    raise event.error
            if on_step is not None:
                on_step(total - self._steps_left(ids), total)
        self._held += others
        return [pictures[id_] for id_ in ids]

    def _abandon(self, ids: Sequence[int]) -> None:
        for id_ in ids:
            self.cancel(id_)

    def _steps_left(self, ids: Sequence[int]) -> int:
        flying = [trajectory for lane in self._lanes.values() for trajectory in lane.trajectories]
        return sum(trajectory.steps - trajectory.done for trajectory in flying if trajectory.id in ids)

    def _check(self, request: Request) -> Table:
        """The request's table. Raises ValueError."""
        request.check(self.autoencoder.factor)
        samplers = self._samplers
        if request.adapter is not None:
            if self._adapters is None:
                raise ValueError(f"adapter={request.adapter!r}: there is no store to load it from; leave it out")
            if self._adapters.check(request.adapter).zero_terminal_snr:
                samplers = self._zero_terminal_snr
        return samplers.table(request.sampler, request.steps, request.start)

    def _choose(self, events: list[Event]) -> tuple[Kind, Means] | None:
        """The next kind in turn that can be drawn, and by what; those whose adapter cannot be loaded are broken."""
        for kind, lane in list(self._lanes.items()):
            if kind.adapter is not None and kind.adapter == self._leaving and not len(lane.batch):
                continue
            try:
                means = self._means(kind)
            except Exception as error:  # whatever the store, diffusers or safetensors may raise
                events += [Broken(trajectory.id, error) for trajectory in self._lanes.pop(kind).trajectories]
            else:
                if means is not None:
                    return kind, means
        return None

    def _means(self, kind: Kind) -> Means | None:
        """What draws a kind; None while its adapter is loaded."""
        if kind.adapter is None or self._adapters is None:
            return Means(self._runner, self._texts)
        wanted = {other.adapter for other in self._lanes if other.adapter}
        drawn = {other.adapter for other, lane in self._lanes.items() if other.adapter and len(lane.batch)}
        adapted = self._adapters.get(kind.adapter, drawn | (wanted - {self._leaving}))
        if adapted is None:
            return None
        if adapted not in self._adapted:
            own = adapted.text_encoder
            texts = self._texts if own is None else Texts(own, self.device, self.dtype)
            self._adapted[adapted] = Means(Runner(adapted.unet, self.device, self.dtype), texts)
        return self._adapted[adapted]

    def _make_places(self) -> None:
        """Where an adapter has waited too long for a place, the one that was joined least recently lets nobody in any more.

        Once its last picture is drawn it is unloaded, and waits itself.
        """
        if self._adapters is None:
            return
        now, starved, joined = time.monotonic(), False, dict[str, int]()
        for kind, lane in self._lanes.items():
            if kind.adapter is None:
                continue
            if kind.adapter in self._adapters:
                lane.no_place_since = None
                if len(lane.batch):
                    joined[kind.adapter] = max(joined.get(kind.adapter, 0), lane.joined)
            else:
                lane.no_place_since = now if lane.no_place_since is None else lane.no_place_since
                starved = starved or now - lane.no_place_since >= PLACE_S
        if not starved:
            self._leaving = None
        elif self._leaving is None or self._leaving not in self._adapters:
            self._leaving = min(joined, key=lambda name: joined[name], default=None)

    def _end_turn_of_alone(self) -> None:
        """Reproducible requests share one turn: the others wait for one of them at a time, however many there are."""
        shared = {kind: lane for kind, lane in self._lanes.items() if kind.alone is None}
        self._lanes = shared | {kind: lane for kind, lane in self._lanes.items() if kind.alone is not None}

    def _advance(self, lane: Lane, means: Means, open_: bool) -> list[Event]:
        """One step of a lane, which others may join if it is `open_`. What goes wrong there is the end of its pictures and of
        nothing else; of previews, of nothing."""
        batch, asked = lane.batch, lane.trajectories
        try:
            if open_:
                self._admit(lane, means.texts)
            self._full = batch.rows + 2 > self.max_rows
            batch.step(means.model)
            self._mark()
            ids = [trajectory.id for trajectory in batch.trajectories]
            finished = _taken(batch)
        except RuntimeError as error:  # what a device refuses: memory above all
            waiting = set(lane.waiting)
            lane.batch = Batch(self.device)
            return [Broken(trajectory.id, error) for trajectory in asked if trajectory not in waiting]
        self.stepped = ids
        self._decoder.add(finished)
        try:
            return self._previews(batch)
        except RuntimeError as error:
            logger.warning("no previews: %s", error)
            return []

    def _mark(self) -> None:
        if self.device.type == "cuda":
            self._step_done = torch.cuda.Event()
            self._step_done.record()

    def _admit(self, lane: Lane, texts: Texts) -> None:
        """Let in those in front for whom there is room."""
        joining: list[Trajectory] = []
        rows = lane.batch.rows
        while lane.waiting and rows + lane.waiting[0].most_rows <= self.max_rows:
            joining.append(lane.waiting.popleft())
            rows += joining[-1].most_rows
        lane.joined = self._ticks if joining else lane.joined
        prompts = [text for one in joining for text in (one.request.prompt, one.request.negative_prompt)]
        states = texts.embed(prompts, alone=any(one.request.reproducible for one in joining))
        for index, trajectory in enumerate(joining):
            pair = torch.stack(states[2 * index : 2 * index + 2])
            lane.batch.join(trajectory, trajectory.start(self.autoencoder, self.device), pair)

    def _previews(self, batch: Batch) -> list[Event]:
        due = [index for index, trajectory in enumerate(batch.trajectories) if trajectory.preview_due]
        if not due:
            return []
        if self._projection is None:
            self._projection = Projection(self.autoencoder)
        flying = [batch.trajectories[index] for index in due]
        pictures = self._projection.pictures(batch.estimate(due), flying[0].request.size_px)
        return [Preview(one.id, picture, one.done, one.steps) for one, picture in zip(flying, pictures, strict=True)]


def _taken(batch: Batch) -> list[Finished]:
    """What is finished, no longer in the batch."""
    finished = [
        Finished(trajectory.id, trajectory.request, batch.latents(index).clone())
        for index, trajectory in enumerate(batch.trajectories)
        if trajectory.done == trajectory.steps
    ]
    batch.drop(one.id for one in finished)
    return finished


def _exact(device: torch.device, dtype: torch.dtype) -> None:
    """Float32 is what it says. For the whole process."""
    if device.type == "cuda" and dtype == torch.float32:
        full_precision()


def _placed(unet: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The UNet where and as it is used: channels_last is what a GPU's convolutions want."""
    unet = torch.nn.Module.to(unet, device, None if dtype == torch.float32 else dtype)
    attention.choose(unet, device, dtype)
    return unet.to(memory_format=torch.channels_last) if device.type == "cuda" else unet
