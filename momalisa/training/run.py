"""From settings to a run: its name says everything that decides its result, so the same settings resume it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from momalisa.captioner import captioner_id
from momalisa.checkpoint import Checkpoint
from momalisa.config import Settings
from momalisa.dataset import Dataset, Version
from momalisa.latents import encoder_id
from momalisa.records import OK
from momalisa.storage import Store
from momalisa.training import cache as caches
from momalisa.training import node
from momalisa.training import split as splits
from momalisa.training.cache import LatentCache
from momalisa.training.loop import Run
from momalisa.weights import identity, short_id

# Settings that decide how fast a run goes or how often it is looked at, but not its result.
SHELL_SETTINGS = {
    "workers",
    "min_workers",
    "resize_check_s",
    "cpus_per_worker",
    "gpus_per_worker",
    "threads",
    "evaluate_every_steps",
    "evaluation_prompts",
    "evaluation_steps",
    "evaluation_guidance",
    "max_failures",
    "gradient_checkpointing",
    "micro_batch",
    "checkpoint_every_images",
    "keep_states",
    "cache_dir",
    "ema_offload",
    "peak_tflops",
    "keep_weights",
    "keep_averages",
    "more_prompts",
    "early_stop_patience",
}


# Part of a name only where they are not what runs before them had.
LATER_SETTINGS = {"deterministic": False, "split_by": "work", "flip": False}


@dataclass(frozen=True)
class Plan:
    """A run's name, the tables it is trained on, and which of their works it is not; cheap to make, small to send."""

    name: str
    encoder_id: str
    tables: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # works in them that turned out to be another work's picture again
    held_out: tuple[str, ...] = ()  # works that promotion measures on
    works: int = 0  # trained on or held out


def plan(settings: Settings) -> Plan:
    """Name the run that these settings and the dataset's latest version make, and split its works.

    Raises ValueError where there are no latents, or works that cannot be split.
    """
    encoder = encoder_id(settings, captioner_id(settings))
    dataset = Dataset(settings.dataset)
    version = dataset.latest()
    tables = tuple(sorted(version.latents.get(encoder, ())))
    if not tables:
        raise ValueError(
            f"{settings.dataset} holds no latents of encoder {encoder}: run the encode job first, with these settings: "
            "python -m ray_jobs.encode --config ... (another model, resolution, bucket, mirrored or caption setting is another "
            "encoder)"
        )
    usual = {name for name, value in LATER_SETTINGS.items() if getattr(settings.train, name) == value}
    decisive = settings.train.model_dump(exclude=SHELL_SETTINGS | usual) | {"cell": settings.train.cell_size}
    base = identity(settings.diffusion.model, settings.diffusion.revision)
    rows = [(row["id"], row["status"] == OK) for row in dataset.small_rows(tables, ["id", "status"])]
    left_out = tuple(sorted(dataset.duplicates(version) & {id for id, _ in rows}))
    good = {id for id, ok in rows if ok}.difference(left_out)
    held_out = splits.held_out(_groups(settings, dataset, version, good), settings.train.held_out_fraction)
    dealt = held_out if settings.train.split_by == "artist" else ()  # who is whose artist may change; a work's id does not
    name = short_id(decisive, base, list(tables), *(works for works in (left_out, dealt) if works))
    return Plan(f"{settings.name}-{name}", encoder, tables, left_out, held_out, len(good))


def _groups(settings: Settings, dataset: Dataset, version: Version, ids: Set[str]) -> dict[str, str]:
    """{id: its group} of works that stay together, on one side of the split."""
    if settings.train.split_by == "work":
        return splits.by_work(ids)
    told = dataset.small_rows(version.images, ["id", "artist"])
    artists = dict.fromkeys(ids, "") | {row["id"]: row["artist"] for row in told if row["id"] in ids}
    return splits.by_artist(artists, settings.train.seed)


def complete(settings: Settings, found: Sequence[Checkpoint]) -> bool:
    """Whether a run with these checkpoints has nothing left to do. One that stopped early has, once `train.early_stop_patience`
    is taken away."""
    if not found:
        return False
    stopped = found[-1].training.get("stopped", False) and settings.train.early_stop_patience is not None
    return stopped or found[-1].images_seen >= settings.train.images


def split(settings: Settings, planned: Plan) -> tuple[LatentCache, LatentCache]:
    """The run's works: (training, held out)."""
    works = caches.load(Dataset(settings.dataset), planned.tables, node.folder(settings.train.cache_dir))
    return works.without({*planned.left_out, *planned.held_out}), works.only(set(planned.held_out))


def load(settings: Settings, planned: Plan) -> Run:
    """Everything a trainer needs."""
    training, _ = split(settings, planned)
    return Run(
        name=planned.name,
        train=settings.train,
        diffusion=settings.diffusion,
        cache=training,
        store=Store(settings.root),
        provenance={
            "dataset": Dataset(settings.dataset).latest().sha256,
            "encoder_id": planned.encoder_id,
            "tables": list(planned.tables),
        },
    )
