"""encode: latent moments of every captioned picture and token ids of its caption, on a pool of actors.

    python -m ray_jobs.encode --config configs/demo.yaml [--encode.resolution_px=128 ...]
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.encode --config configs/sd14.yaml

Writes latents/<encoder-id>/ and a new version of the dataset: what training reads. Run it again after captioning
more: only new works are encoded, and a caption that a curator has edited takes its place. Another base model,
resolution or captioner is another family beside the first; so is one with mirror images (`encode.mirrored`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from momalisa.config import Settings
from ray_jobs._job import job, pace


def run(settings: Settings) -> dict[str, Any]:
    """Fill the family of latents, publish, and return the stage's summary."""
    from momalisa.captioner import captioner_id
    from momalisa.dataset import Dataset
    from momalisa.dataset.wording import reworded
    from momalisa.family import Family
    from momalisa.latents import encoder_id, frame, load_tokenizer, tokenize
    from momalisa.records import LATENTS, MIRRORED_LATENTS
    from ray_jobs._tables import fill

    dataset, captions_id = Dataset(settings.dataset), captioner_id(settings)
    version, family_id = dataset.latest(), encoder_id(settings, captions_id)
    if not version.captions.get(captions_id):
        missing = "run the caption job first" if version.images else "run the collect job first, then the caption job"
        raise ValueError(f"{settings.dataset} holds no captions by {settings.caption.model} ({captions_id}): {missing}")
    tokenizer = load_tokenizer(settings.diffusion)  # a name that cannot be loaded fails here, before any actor starts
    chosen, tables = settings.encode, version.latents.get(family_id, ())
    texts = dataset.texts(version, captions_id, chosen.caption)
    schema = MIRRORED_LATENTS if chosen.mirrored else LATENTS
    family = Family("encode", chosen, f"latents/{family_id}", schema, (frame(chosen),), partial(load, settings))
    done, changed = reworded(dataset, family.folder, tables, texts, partial(tokenize, tokenizer))
    summary = fill(settings, family, done, texts)
    paths, draft = summary.pop("paths"), summary.pop("draft")
    summary |= {"new": summary["new"] + changed, "skipped": summary["skipped"] - changed}
    if paths or done != tables:
        dataset.add(family.folder, [*done, *paths], began=version, instead_of=tables)
        draft.clear()
    else:
        print(f"encode: nothing new ({summary['rows_out']} works)")
    return summary


def load(settings: Settings, device: str) -> Any:
    """What an actor holds: the VAE, in full precision everywhere, and the tokenizer."""
    import torch

    from momalisa.family import ERROR, Model, Pixels, Work
    from momalisa.latents import Autoencoder, from_bytes, load_tokenizer, tokenize
    from momalisa.precision import full_precision
    from momalisa.records import OK

    full_precision()
    autoencoder, tokenizer = Autoencoder.load(settings.diffusion, device), load_tokenizer(settings.diffusion)
    nothing = {"moments": b"", "mirrored": b"", "channels": 0, "height": 0, "width": 0, "token_ids": []}

    class Latents(Model):
        def rows(self, works: list[Work], pixels: list[Pixels]) -> list[dict[str, Any]]:
            seen = from_bytes(torch.from_numpy(pixels[0]).to(device))
            sides = {"moments": autoencoder.encode(seen)}
            if settings.encode.mirrored:
                sides["mirrored"] = autoencoder.encode(seen.flip(-1))
            token_ids = tokenize(tokenizer, [work["text"] for work in works])
            each = [dict(zip(sides, moments, strict=True)) for moments in zip(*sides.values(), strict=True)]
            return [self.row(*item) for item in zip(works, each, token_ids, strict=True)]

        def row(self, work: Work, sides: dict[str, torch.Tensor], token_ids: torch.Tensor) -> dict[str, Any]:
            if not all(moments.isfinite().all() for moments in sides.values()):
                return self.failed(work, "its latents are not finite")
            channels, height, width = autoencoder.channels, *sides["moments"].shape[-2:]
            shape = {"channels": channels, "height": height, "width": width}
            values = {column: moments.numpy().astype("<f2").tobytes() for column, moments in sides.items()}
            found = {**values, "caption": work["text"], "token_ids": token_ids.tolist()}
            return {"id": work["id"], **found, **shape, "status": OK, "error": ""}

        def failed(self, work: Work, error: str) -> dict[str, Any]:
            return {"id": work["id"], "caption": work["text"], **nothing, "status": ERROR, "error": error}

    return Latents()


def main() -> None:
    job(__doc__, "encode", run, pace)


if __name__ == "__main__":
    main()
