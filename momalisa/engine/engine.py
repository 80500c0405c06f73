"""The one place where noise is turned into art: a queue of requests, and a tick that takes them a step on.

Requests of any prompt, sampler, number of steps, scale, image or mask share a batch, and join it at the next tick.
What one request gets does not depend on its neighbours but for the last bits of float sums, and not even for those with
`reproducible`. The server, the evaluation pictures of training, and promotion all draw through here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from momalisa.config import Diffusion
from momalisa.engine.batch import Batch
from momalisa.engine.decoding import Decoder, Finished
from momalisa.engine.events import Broken, Done, Event, Preview
from momalisa.engine.preview import Projection
from momalisa.engine.request import Request
from momalisa.engine.samplers import Samplers, scheduler_config
from momalisa.engine.texts import Texts
from momalisa.engine.trajectory import Trajectory
from momalisa.latents import Autoencoder, TextEncoder

OnStep = Callable[[int, int], None]
MAX_ROWS = 32
DECODED_TOGETHER = 8


@dataclass(frozen=True)
class Kind:
    """What requests must have in common to share a batch; a reproducible one has its own id, so shares with nobody."""

    size_px: int
    adapter: str | None
    alone: int | None


@dataclass(eq=False)
class Lane:
    """Requests of one kind: those that wait, in order, and those that are drawn."""

    batch: Batch
    waiting: deque[Trajectory] = field(default_factory=deque)

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
    ) -> None:
        """`unet` is moved to `device`, and to `dtype` unless that is float32; its mode is kept.

        `max_rows`: UNet rows of a tick; a guided picture takes two. Raises ValueError where it is less than 2.
        """
        if max_rows < 2:
            raise ValueError(f"max_rows={max_rows} must be at least 2: a guided picture is two rows")
        self.device, self.dtype, self.max_rows = torch.device(device), dtype, max_rows
        self.unet = unet.to(self.device) if dtype == torch.float32 else unet.to(self.device, dtype)
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self._samplers = Samplers(scheduler_config)
        self._texts = Texts(text_encoder, self.device, dtype)
        self._decoder = Decoder(autoencoder, self.device, DECODED_TOGETHER)
        self._projection: Projection | None = None
        self._lanes: dict[Kind, Lane] = {}
        self._held: list[Event] = []
        self._next_id = 0

    @classmethod
    def load(
        cls,
        diffusion: Diffusion,
        unet: Any = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_rows: int = MAX_ROWS,
    ) -> Engine:
        """The base's pipeline around `unet` (default: the base's own). Raises ValueError where the base cannot be loaded."""
        from momalisa.checkpoint import load_base_unet

        autoencoder = Autoencoder.load(diffusion, device, dtype)
        text_encoder = TextEncoder.load(diffusion, device, dtype)
        unet = load_base_unet(diffusion) if unet is None else unet
        return cls(unet, autoencoder, text_encoder, scheduler_config(diffusion), device, dtype, max_rows)

    @property
    def rows(self) -> int:
        """UNet rows of the pictures that are being drawn."""
        return sum(lane.batch.rows for lane in self._lanes.values())

    @property
    def pending_row_steps(self) -> int:
        """Rows times steps still to do, for those that wait too: the engine's load."""
        return sum(trajectory.row_steps for lane in self._lanes.values() for trajectory in lane.trajectories)

    @property
    def idle(self) -> bool:
        """Whether a tick would find nothing to do."""
        return not (self._lanes or self._held or len(self._decoder))

    def submit(self, request: Request) -> int:
        """Its id in events. It joins at the next tick with room. Raises ValueError for a request that cannot be."""
        request.check(self.autoencoder.factor)
        table = self._samplers.table(request.sampler, request.steps, request.start)
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
        """One step for the pictures of one kind, kinds taking turns; then some decoding. What there is to say about requests."""
        events, self._held = self._held, []
        if self._lanes:
            kind = next(iter(self._lanes))
            lane = self._lanes.pop(kind)
            events += self._advance(lane)
            if lane.trajectories:
                self._lanes[kind] = lane  # last in turn
        return events + self._decoder.poll(wait=not self._lanes)

    def generate(self, requests: Sequence[Request], on_step: OnStep | None = None) -> list[Image.Image]:
        """RGB pictures in the order of the requests, however many. `on_step(done, total)`: picture steps, after every tick.

        Raises ValueError for a request that cannot be, GenerationError where the result is not finite.
        """
        for request in requests:
            request.check(self.autoencoder.factor)
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

    def _advance(self, lane: Lane) -> list[Event]:
        """One step of a lane. What goes wrong there is the end of its pictures and of nothing else."""
        try:
            self._admit(lane)
            lane.batch.step(self._forward)
        except RuntimeError as error:  # what a device refuses: memory above all
            broken = lane.batch.trajectories
            lane.batch = Batch(self.device)
            return [Broken(trajectory.id, error) for trajectory in broken]
        previews = self._previews(lane.batch)
        batch = lane.batch
        finished = [index for index, trajectory in enumerate(batch.trajectories) if trajectory.done == trajectory.steps]
        if finished:
            flying = [batch.trajectories[index] for index in finished]
            latents = [batch.latents(index).clone() for index in finished]
            self._decoder.add(Finished(one.id, one.request, last) for one, last in zip(flying, latents, strict=True))
            batch.drop(one.id for one in flying)
        return previews

    def _admit(self, lane: Lane) -> None:
        """Those in front for whom there is room."""
        joining: list[Trajectory] = []
        rows = lane.batch.rows
        while lane.waiting and rows + lane.waiting[0].most_rows <= self.max_rows:
            joining.append(lane.waiting.popleft())
            rows += joining[-1].most_rows
        texts = [text for one in joining for text in (one.request.prompt, one.request.negative_prompt)]
        states = self._texts.embed(texts, alone=any(one.request.reproducible for one in joining))
        for index, trajectory in enumerate(joining):
            prompts = torch.stack(states[2 * index : 2 * index + 2])
            lane.batch.join(trajectory, trajectory.start(self.autoencoder, self.device), prompts)

    def _forward(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        output: Tensor = self.unet(latents.to(self.dtype), timesteps, encoder_hidden_states=states, return_dict=False)[0]
        return output.float()

    def _previews(self, batch: Batch) -> list[Event]:
        due = [index for index, trajectory in enumerate(batch.trajectories) if trajectory.preview_due]
        if not due:
            return []
        if self._projection is None:
            self._projection = Projection(self.autoencoder)
        flying = [batch.trajectories[index] for index in due]
        pictures = self._projection.pictures(batch.estimate(due), flying[0].request.size_px)
        return [Preview(one.id, picture, one.done, one.steps) for one, picture in zip(flying, pictures, strict=True)]
