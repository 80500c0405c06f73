"""What the UNet is trained on in each step: everything random is drawn here.

A function of (settings, images seen, rank, workers), and nothing else. Beside a GPU it is made ahead of time in a thread.
On a CPU it is made when it is asked for (1% of a step): a second thread with a team of OpenMP's makes more of its threads
than there are processors, libgomp then stops spinning, and every small operation of a step waits for threads to wake up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from momalisa.config import Train
from momalisa.diffusion import Schedule, draws
from momalisa.latents import TextEncoder, sample
from momalisa.training.cache import LatentCache
from momalisa.training.sampler import Cells, Sample, deal, passes

EMBEDDED_AT_ONCE = 64
MOST_EMBEDDINGS_BYTES = 4 << 30  # beyond that, texts are embedded as they come


@dataclass(frozen=True)
class Pass:
    """Samples of one shape that go through the UNet together, on the CPU. Their weights [B] sum to their share of the step."""

    ids: list[str]
    noisy: torch.Tensor  # [B, C, H, W] float32
    target: torch.Tensor  # [B, C, H, W] float32: what is to be predicted
    timesteps: torch.Tensor  # [B] int64
    text: torch.Tensor  # [B, L, D] embeddings, or [B, L] token ids
    weights: torch.Tensor  # [B] float32
    general: torch.Tensor | None = None  # as `text`: general prompts, for prior preservation

    def to(self, device: torch.device) -> Pass:
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> Pass:
        """In memory from which a copy to a GPU need not be waited for."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Pass:
        changed: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **changed)


class Texts:
    """Token ids -> embeddings, each distinct text embedded once, in fixed groups, so that nothing depends on a batch.

    Where the table would be too large, token ids are passed through and embedded in the step; so are they where the
    encoder is trained.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        token_ids: torch.Tensor,
        dtype: torch.dtype,
        general: Sequence[str] = (),
        trained: bool = False,
    ) -> None:
        """`token_ids` [N, L] of the works; the `general` texts and the empty one are added."""
        self.works, self.general_count = len(token_ids), len(general)
        self.token_ids = torch.cat([token_ids, encoder.tokenize([*general, ""])])
        distinct, self.places = torch.unique(self.token_ids, dim=0, return_inverse=True)
        width = encoder.model.config.hidden_size
        self.table: torch.Tensor | None = None
        if not trained and len(distinct) * distinct.shape[1] * width * dtype.itemsize <= MOST_EMBEDDINGS_BYTES:
            groups = distinct.split(EMBEDDED_AT_ONCE)
            self.table = torch.cat([encoder.embed(group).to("cpu", dtype) for group in groups])

    def __call__(self, indices: list[int], dropped: torch.Tensor) -> torch.Tensor:
        """The texts of works, the empty one where `dropped` [B]."""
        return self._at(torch.where(dropped, len(self.token_ids) - 1, torch.tensor(indices)))

    def general(self, drawn: torch.Tensor) -> torch.Tensor:
        """General texts, by a number [B] drawn for each."""
        return self._at(self.works + drawn % self.general_count)

    def _at(self, chosen: torch.Tensor) -> torch.Tensor:
        return self.token_ids[chosen] if self.table is None else self.table[self.places[chosen]]


class Batches:
    """The passes of one worker, step by step; beside a GPU the next step's are made while this one's are used."""

    def __init__(
        self,
        train: Train,
        cache: LatentCache,
        schedule: Schedule,
        texts: Texts,
        scaling_factor: float,
        rank: int = 0,
        workers: int = 1,
        beside_gpu: bool = False,
    ) -> None:
        """Raises ValueError where works are to be flipped and there are no mirror images."""
        if train.flip and cache.mirrored is None:
            raise ValueError(
                "train.flip=true, but these latents have no mirror images: set encode.mirrored=true, and run the encode job "
                "again with it: python -m ray_jobs.encode --config ..."
            )
        self.train, self.cache, self.schedule, self.texts, self.scaling_factor = train, cache, schedule, texts, scaling_factor
        self.rank, self.workers, self.beside_gpu = rank, workers, beside_gpu
        self.cells = Cells(train.seed, cache.buckets(), train.cell_size)
        self._thread = ThreadPoolExecutor(1, "batches") if beside_gpu else None
        self._ahead: tuple[int, Future[list[Pass]]] | None = None

    def at(self, images_seen: int) -> list[Pass]:
        """The passes of the step that begins after so many images; never none."""
        if self._thread is None:
            return self.make(images_seen)
        if self._ahead is None or self._ahead[0] != images_seen:
            self._ahead = (images_seen, self._thread.submit(self.make, images_seen))
        found = self._ahead[1].result()
        following = images_seen + self.train.batch
        self._ahead = (following, self._thread.submit(self.make, following))
        return found

    def make(self, images_seen: int) -> list[Pass]:
        """As `at`, made now. A worker without a cell gets one without weight: every worker takes part in the exchange."""
        size = self.train.cell_size
        cells = self.cells.run(images_seen // size, self.train.batch // size)
        mine = deal(cells, self.rank, self.workers)
        if not mine:
            return [self._pass(list(cells[0].samples), 0.0)]
        return [self._pass(samples, 1.0) for samples in passes(mine, self.train.micro_batch)]

    def most_shapes(self) -> int:
        """How many shapes [B, C, H, W] a pass can have at most: each bucket's, with every number of samples."""
        share = self.train.share_of(self.workers)
        return len(self.cells.buckets) * min(self.train.micro_batch or share, share)

    def ids(self, images_seen: int) -> list[str]:
        """The works of the whole global batch that begins after so many images."""
        size = self.train.cell_size
        cells = self.cells.run(images_seen // size, self.train.batch // size)
        return [self.cache.ids[index] for cell in cells for _, index in cell.samples]

    def _pass(self, samples: list[Sample], weight: float) -> Pass:
        indices = [index for _, index in samples]
        rows, settings = self.cache.rows(indices), self.train
        keys = [(epoch, work) for (epoch, _), work in zip(samples, rows.ids, strict=True)]
        channels, height, width = rows.moments[0].shape[0] // 2, *rows.moments[0].shape[1:]
        shape = (channels, height, width)
        drawn = draws(settings.seed, keys, shape, len(self.schedule), settings.caption_dropout, settings.offset_noise)
        shown = rows.flipped(drawn.flipped) if settings.flip else rows
        latents = sample(shown.stacked(), drawn.latent_noise, self.scaling_factor)
        made = Pass(
            ids=rows.ids,
            noisy=self.schedule.add_noise(latents, drawn.noise, drawn.timesteps),
            target=self.schedule.target(latents, drawn.noise, drawn.timesteps),
            timesteps=drawn.timesteps,
            text=self.texts(indices, drawn.dropped),
            weights=self.schedule.weights(drawn.timesteps, settings.min_snr_gamma) * (weight / settings.batch),
            general=self.texts.general(drawn.prompts) if settings.prior_weight else None,
        )
        return made.pinned() if self.beside_gpu else made

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
