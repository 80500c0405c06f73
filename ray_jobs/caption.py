"""caption: describe every picture of the dataset that has no caption yet, on a pool of actors: BLIP, and Florence-2 if asked.

    python -m ray_jobs.caption --config configs/demo.yaml [--caption.batch=32 ...]
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.caption --config configs/sd14.yaml

Writes captions/<captioner-id>/ and a new version of the dataset. Run it again after collecting more: only new
pictures are described. A row holds a short caption, a long one (`--caption.long_model=florence-community/Florence-2-base`)
and a fused one with the work's title, artist and medium; another model, prefix or length is another family beside the first.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from momalisa.config import Settings
from ray_jobs._job import job, pace

if TYPE_CHECKING:
    from momalisa.square import Square


def run(settings: Settings) -> dict[str, Any]:
    """Fill the family of captions, publish, and return the stage's summary."""
    from momalisa.captioner import captioner_id
    from momalisa.dataset import Dataset
    from momalisa.family import Family
    from momalisa.records import CAPTIONS, DETAILS
    from ray_jobs._tables import fill

    dataset, family_id = Dataset(settings.dataset), captioner_id(settings)
    version = dataset.latest()
    if not version.images:
        raise ValueError(f"{settings.dataset} holds no pictures: run the collect job first")
    folder, model, known = f"captions/{family_id}", partial(load, settings), version.captions.get(family_id, ())
    family = Family("caption", settings.caption, folder, CAPTIONS, squares(settings), model, DETAILS)
    summary = fill(settings, family, known)
    draft = summary.pop("draft")
    if paths := summary.pop("paths"):
        dataset.add(family.folder, paths, began=version)
        draft.clear()
    else:
        print(f"caption: nothing new ({summary['rows_out']} captions)")
    return summary


def squares(settings: Settings) -> tuple[Square, ...]:
    """What the captioners look at. It loads their small parts, so a name that cannot be loaded fails before any actor starts."""
    from momalisa.captioner import load_processors
    from momalisa.captioner.florence import load_processor, square_of
    from momalisa.latents import load_tokenizer

    chosen = settings.caption
    load_tokenizer(settings.diffusion)
    processors = [load_processors(chosen)[0], *([load_processor(chosen).image_processor] if chosen.long_model else [])]
    return tuple(square_of(processor) for processor in processors)


def load(settings: Settings, device: str) -> Any:
    """What an actor holds: the captioners, and the tokenizer that measures fused captions."""
    import torch

    from momalisa.captioner import DTYPES, Captioner
    from momalisa.captioner.florence import Florence
    from momalisa.captioner.fused import details, fuse
    from momalisa.family import ERROR, Model, Pixels, Work
    from momalisa.latents import load_tokenizer
    from momalisa.records import DETAILS, OK

    chosen, tokenizer = settings.caption, load_tokenizer(settings.diffusion)
    captioner = Captioner.load(chosen, device)
    florence = Florence.load(chosen, device, DTYPES[chosen.precision]) if chosen.long_model else None

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    class Captions(Model):
        def rows(self, works: list[Work], pixels: list[Pixels]) -> list[dict[str, Any]]:
            seen = [torch.from_numpy(array) for array in pixels]
            short = captioner.generate(seen[0])
            long = florence.generate(seen[1]) if florence else [None] * len(works)
            return [self.row(*item) for item in zip(works, short, long, strict=True)]

        def row(self, work: Work, short: str, long: str | None) -> dict[str, Any]:
            if not short or long == "":
                return self.failed(work, f"the {'long ' if short else ''}caption is empty")
            fused = fuse(short, details(*(work[name] for name in DETAILS)), count)
            long = chosen.prefix + long if long else ""
            return {"id": work["id"], "short": short, "long": long, "fused": fused, "status": OK, "error": ""}

        def failed(self, work: Work, error: str) -> dict[str, Any]:
            return {"id": work["id"], "short": "", "long": "", "fused": "", "status": ERROR, "error": error}

    return Captions()


def main() -> None:
    job(__doc__, "caption", run, pace)


if __name__ == "__main__":
    main()
