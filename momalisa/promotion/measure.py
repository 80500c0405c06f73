"""What is measured of one model, each a function of settings, run and a checkpoint's path (None: the base).

Results are kept below `evaluations/<run>/<images>/<what decides them>/`, so nothing is measured twice, and whoever comes
next (promotion, an early stop, retention) finds them. Each function leaves torch's random state as it was.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from momalisa import alignment, copies
from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import NoCheckpoint
from momalisa.config import Settings
from momalisa.dataset import Dataset
from momalisa.diffusion import Schedule
from momalisa.engine import Engine, Request
from momalisa.latents import Autoencoder, TextEncoder
from momalisa.precision import full_precision
from momalisa.promotion import general
from momalisa.quality import ClipFeatures, held_out_losses, mmd2
from momalisa.storage import Store
from momalisa.training import run as runs
from momalisa.training.cache import LatentCache
from momalisa.training.run import Plan
from momalisa.weights import identity, short_id

PICTURE_SEED = 10_000
GATE_SEED = 20_000
LOSSES, GATES, DISTANCE = "losses", "gates", "distance"
DECISIVE = {
    LOSSES: ("timesteps", "max_pictures"),
    GATES: ("gate_pictures", "general_pictures", "timesteps", "distance_steps", "guidance_scale"),
    DISTANCE: ("distance_pictures", "distance_steps", "guidance_scale", "reference"),
}
Measured = dict[str, Any]  # numbers and lists, as JSON


def device(settings: Settings) -> torch.device:
    """What a measurement was given: a GPU that is merely visible (Ray hides none) may be another one's."""
    given = settings.promote.gpus_per_task > 0 and torch.cuda.is_available()
    return torch.device("cuda" if given else "cpu")


def rules(settings: Settings, what: str) -> str:
    """A name for what decides a measurement, but for the weights that are measured."""
    chosen = settings.promote
    judges = {
        LOSSES: (),
        GATES: (general.path(settings), _identity(chosen.alignment_model, chosen.alignment_revision)),
        DISTANCE: (_identity(chosen.clip_model, chosen.clip_revision),),
    }[what]
    base = identity(settings.diffusion.model, settings.diffusion.revision)
    return short_id(what, base, [getattr(chosen, field) for field in DECISIVE[what]], judges, settings.encode.resolution_px)


def place(settings: Settings, planned: Plan, path: str | None, what: str) -> str:
    """Where a measurement is kept: of these very weights, by these very rules. Raises NoCheckpoint where they are gone."""
    weights = sorted(checkpoints.read(Store(settings.root), path).files.items()) if path is not None else []
    name = short_id(rules(settings, what), weights)
    return f"evaluations/{planned.name}/{'base' if path is None else path.rsplit('/', 1)[-1]}/{name}/{what}.json"


def _identity(model: str | None, revision: str | None) -> str | None:
    return identity(model, revision) if model else None


def known(settings: Settings, planned: Plan, path: str | None, what: str) -> Measured | None:
    """What was measured before, or None; {"error": why} of a checkpoint that is gone."""
    try:
        return _kept(settings, place(settings, planned, path, what))
    except NoCheckpoint as error:
        return {"error": str(error)}


def _kept(settings: Settings, where: str) -> Measured | None:
    try:
        found: Measured = Store(settings.root).read_json(where)
    except FileNotFoundError:
        return None
    return found


def measured(settings: Settings, planned: Plan, path: str | None, what: str) -> Measured:
    """Measure, or read what was measured. A checkpoint that is not whole, or was deleted meanwhile, gives {"error": why} and
    leaves nothing behind."""
    try:
        where = place(settings, planned, path, what)
    except NoCheckpoint as error:
        return {"error": str(error)}
    if (found := _kept(settings, where)) is not None:
        return found
    functions: dict[str, Callable[[Settings, Plan, Model], Measured]] = {LOSSES: _losses, GATES: _gates, DISTANCE: _distance}
    full_precision()
    own = [torch.cuda.current_device()] if device(settings).type == "cuda" else []
    with torch.random.fork_rng(devices=own):
        try:
            model = load(settings, path)
        except (ValueError, OSError) as error:
            if path is None:
                raise
            return {"error": str(error)}
        result = {"checkpoint": path, "rules": rules(settings, what), **functions[what](settings, planned, model)}
    Store(settings.root).write_json(where, result)
    return result


def mean_losses(settings: Settings, planned: Plan) -> dict[int, float]:
    """{images seen: mean held-out loss} of all the run's checkpoints that were measured by these rules, those too that are gone
    by now."""
    store, wanted, found = Store(settings.root), rules(settings, LOSSES), {}
    for path in store.list(f"evaluations/{planned.name}"):
        images = path.split("/")[2]
        if path.endswith(f"/{LOSSES}.json") and images.isdigit():
            kept = store.read_json(path)
            if kept.get("rules") == wanted:
                found[int(images)] = sum(kept["held_out"]) / len(kept["held_out"])
    return found


@dataclass(frozen=True)
class Model:
    """What is measured: the parts of a pipeline that fine-tuning changes, and the schedule that they are sampled on."""

    unet: Any
    text_encoder: TextEncoder
    zero_terminal_snr: bool = False


def load(settings: Settings, path: str | None) -> Model:
    """The model of a checkpoint's path, or the base for None, on the device that there is for it."""
    if path is None:
        unet = checkpoints.load_base_unet(settings.diffusion).to(device(settings))
        return Model(unet, TextEncoder.load(settings.diffusion, device(settings)))
    store = Store(settings.root)
    found = checkpoints.read(store, path)
    unet = checkpoints.load_unet(store, found).to(device(settings))
    return Model(unet, checkpoints.load_text_encoder(store, found, device(settings)), found.zero_terminal_snr)


def _losses(settings: Settings, planned: Plan, model: Model) -> Measured:
    """`held_out`: losses of works that training never saw."""
    _, held_out = runs.split(settings, planned)
    works = held_out.rows(list(range(min(len(held_out), settings.promote.max_pictures))))
    return {"held_out": _grid(settings, model, works)}


def _grid(settings: Settings, model: Model, rows: LatentCache) -> list[float]:
    """The loss of each row, over a fixed grid of timesteps and noise."""
    chosen, factor = settings.promote, Autoencoder.load(settings.diffusion).scaling_factor
    schedule = Schedule.load(settings.diffusion, settings.train.zero_terminal_snr)
    losses = held_out_losses(model.unet, schedule, model.text_encoder, factor, rows, chosen.timesteps, chosen.batch)
    found: list[float] = losses.tolist()
    return found


def draw_general(settings: Settings) -> None:
    """Have the base draw the general captions, unless it did."""
    full_precision()
    general.draw(settings, device(settings))


def _gates(settings: Settings, planned: Plan, model: Model) -> Measured:
    """`general`: losses of the general captions. `alignment`: a score for each picture of a training caption. `nearest`: its
    distance to the nearest training picture; `limit`: the distance below which it is a copy."""
    found: Measured = {"general": None, "alignment": None, "nearest": None, "limit": None}
    if settings.promote.general_pictures:
        draw_general(settings)
        found["general"] = _grid(settings, model, general.load(settings))
    return found | (_pictures(settings, planned, model) if settings.promote.gate_pictures else {})


def _pictures(settings: Settings, planned: Plan, model: Model) -> Measured:
    """What pictures of training captions show."""
    chosen = settings.promote
    training, held_out = runs.split(settings, planned)
    some = np.linspace(0, len(training) - 1, chosen.gate_pictures).round().astype(int).tolist()
    prompts = [training.captions[index] for index in some]
    pictures = opened(drawn(settings, model, prompts, GATE_SEED))
    found: Measured = {}
    if chosen.alignment_model is not None:
        judge = alignment.load(chosen.alignment_model, chosen.alignment_revision, settings.diffusion, device(settings))
        asked = [prompt.removeprefix(settings.caption.prefix) for prompt in prompts]
        found["alignment"] = judge(pictures, asked).tolist()
    looks = thumbnails(settings)
    ours, theirs = ([looks[id] for id in half.ids if id in looks] for half in (training, held_out))
    if len(ours) > 1 and theirs:
        trained = np.stack(ours)
        found["nearest"] = copies.nearest(copies.features(pictures), trained).tolist()
        found["limit"] = copies.threshold(trained, np.stack(theirs))
    return found


def thumbnails(settings: Settings) -> dict[str, np.ndarray]:
    """The looks [16, 16, 3] of works by their ids, each the square that training sees."""
    dataset = Dataset(settings.dataset)
    rows = dataset.rows(dataset.latest().images, ["id", "thumbnail", "width", "height"])
    return {row["id"]: copies.squared(row["thumbnail"], row["width"], row["height"]) for row in rows if row["thumbnail"]}


def _distance(settings: Settings, planned: Plan, model: Model) -> Measured:
    """`mmd`: MMD^2 x 1000 of pictures of the reference's captions to the reference, of `pictures` pairs."""
    assert settings.promote.clip_model is not None
    pairs, _ = references(settings, planned)
    features = ClipFeatures(settings.promote.clip_model, settings.promote.clip_revision, device(settings))
    pictures = opened(drawn(settings, model, [caption for caption, _ in pairs], PICTURE_SEED))
    return {"mmd": mmd2(features(pictures), features([picture for _, picture in pairs])), "pictures": len(pairs)}


def collection_distance(settings: Settings, planned: Plan) -> float | None:
    """MMD^2 x 1000 of the reference to more of itself; None where there is no more."""
    assert settings.promote.clip_model is not None
    pairs, more = references(settings, planned)
    if len(more) < 2:
        return None
    full_precision()
    features = ClipFeatures(settings.promote.clip_model, settings.promote.clip_revision, device(settings))
    return mmd2(features(more), features([picture for _, picture in pairs]))


def generate(settings: Settings, path: str | None, prompts: Sequence[str], first_seed: int) -> list[bytes]:
    """PNG pictures of prompts by a checkpoint (None: the base), at seeds that are equal for every checkpoint."""
    return drawn(settings, load(settings, path), prompts, first_seed)


def drawn(settings: Settings, model: Model, prompts: Sequence[str], first_seed: int) -> list[bytes]:
    """PNG pictures of prompts by a model; the seed of each is its place's."""
    engine = Engine.load(
        settings.diffusion,
        model.unet,
        device(settings),
        text_encoder=model.text_encoder,
        zero_terminal_snr=model.zero_terminal_snr,
    )
    chosen, pictures = settings.promote, []
    for start in range(0, len(prompts), chosen.batch):
        requests = [
            Request(
                prompt=prompt,
                seed=first_seed + start + index,
                steps=chosen.distance_steps,
                guidance_scale=chosen.guidance_scale,
                size_px=settings.encode.resolution_px,
            )
            for index, prompt in enumerate(prompts[start : start + chosen.batch])
        ]
        pictures += [png(picture) for picture in engine.generate(requests)]
    return pictures


def png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def opened(pictures: Sequence[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]


def references(settings: Settings, planned: Plan) -> tuple[list[tuple[str, Image.Image]], list[Image.Image]]:
    """(caption, picture) pairs that generated pictures are compared with, and more pictures of the same captions.

    The miniature museum's works never end, so both come from seeds that nobody has seen; a real collection has its
    held-out works and no more.
    """
    if settings.promote.reference == "wing":
        from momalisa.miniature.wing import further_works

        count = settings.promote.distance_pictures
        pairs = [(settings.caption.prefix + caption, picture) for caption, picture in further_works(count, seed=1)]
        return pairs, [picture for _, picture in further_works(count, seed=2)]
    _, held_out = runs.split(settings, planned)
    captions = dict(zip(held_out.ids, held_out.captions, strict=True))
    dataset = Dataset(settings.dataset)
    rows = dataset.rows(dataset.latest().images, ["id", "bytes"])
    pairs = [(captions[row["id"]], opened([row["bytes"]])[0]) for row in rows if row["id"] in captions]
    return pairs[: settings.promote.distance_pictures], []
