"""caption: describe every picture of the dataset that has no caption yet, with BLIP on a pool of actors.

    python -m ray_jobs.caption --config configs/demo.yaml [--caption.batch=32 ...]
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.caption --config configs/sd14.yaml

Writes captions/<captioner-id>/ and a new version of the dataset. Run it again after collecting more: only new
pictures are described. Another model, prefix or length is another family beside the first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from momalisa.config import Caption, Settings
from ray_jobs._job import job


def run(settings: Settings) -> dict[str, Any]:
    """Fill the family of captions, publish, and return the stage's summary."""
    from momalisa.captioner import captioner_id, load_processors
    from momalisa.dataset import Dataset
    from momalisa.records import CAPTIONS
    from ray_jobs._tables import Family, fill

    chosen, dataset = settings.caption, Dataset(settings.dataset)
    version, family_id = dataset.latest(), captioner_id(chosen)
    if not version.images:
        raise ValueError(f"{settings.dataset} holds no pictures: run the collect job first")
    load_processors(chosen)  # a name that cannot be loaded fails here, before any actor starts
    family = Family("caption", chosen, f"captions/{family_id}", CAPTIONS, partial(load, chosen))
    summary = fill(settings, family, version.captions.get(family_id, ()))
    if paths := summary.pop("paths"):
        dataset.add(family.folder, paths, began=version)
    else:
        print(f"caption: nothing new ({summary['rows_out']} captions)")
    return summary


def load(chosen: Caption, device: str) -> Any:
    """What an actor holds: BLIP, in half precision on a GPU."""
    import torch

    from momalisa.captioner import Captioner
    from momalisa.records import OK
    from ray_jobs._tables import ERROR, Model, open_picture

    captioner = Captioner.load(chosen, device, torch.float16 if device == "cuda" else torch.float32)

    class Captions(Model):
        def prepare(self, data: bytes) -> torch.Tensor:
            return captioner.prepare(open_picture(data))

        def rows(self, ids: list[str], texts: list[str], prepared: list[Any]) -> list[dict[str, Any]]:
            captions = captioner.generate(torch.stack(prepared))
            return [
                {"id": id, "short": caption, "status": OK, "error": ""}
                if caption
                else self.failed(id, "", "the caption is empty")
                for id, caption in zip(ids, captions, strict=True)
            ]

        def failed(self, id: str, text: str, error: str) -> dict[str, Any]:
            return {"id": id, "short": "", "status": ERROR, "error": error}

    return Captions()


def main() -> None:
    job(__doc__, "caption", run, lambda done: f"{done['new']} new, {done['rejected']} failed, {done['seconds']:.0f} s")


if __name__ == "__main__":
    main()
