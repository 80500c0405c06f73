"""encode: latent moments of every captioned picture and token ids of its caption, on a pool of actors.

    python -m ray_jobs.encode --config configs/demo.yaml [--encode.resolution_px=128 ...]
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.encode --config configs/sd14.yaml

Writes latents/<encoder-id>/ and a new version of the dataset: what training reads. Run it again after captioning
more: only new works are encoded, and a caption that a curator has edited takes its place. Another base model,
resolution or captioner is another family beside the first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from momalisa.config import Settings
from ray_jobs._job import job


def run(settings: Settings) -> dict[str, Any]:
    """Fill the family of latents, publish, and return the stage's summary."""
    from momalisa.captioner import captioner_id
    from momalisa.dataset import Dataset
    from momalisa.dataset.wording import reworded
    from momalisa.latents import encoder_id, load_tokenizer, tokenize
    from momalisa.records import LATENTS
    from ray_jobs._tables import Family, fill

    dataset, captions_id = Dataset(settings.dataset), captioner_id(settings.caption)
    version, family_id = dataset.latest(), encoder_id(settings, captions_id)
    if not version.captions.get(captions_id):
        missing = "run the caption job first" if version.images else "run the collect job first, then the caption job"
        raise ValueError(f"{settings.dataset} holds no captions by {settings.caption.model} ({captions_id}): {missing}")
    tokenizer = load_tokenizer(settings.diffusion)  # a name that cannot be loaded fails here, before any actor starts
    texts, tables = dataset.texts(version, captions_id), version.latents.get(family_id, ())
    family = Family("encode", settings.encode, f"latents/{family_id}", LATENTS, partial(load, settings))
    done, changed = reworded(dataset, family.folder, tables, texts, partial(tokenize, tokenizer))
    summary = fill(settings, family, done, texts)
    paths = summary.pop("paths")
    summary |= {"new": summary["new"] + changed, "skipped": summary["skipped"] - changed}
    if paths or done != tables:
        dataset.add(family.folder, [*done, *paths], began=version, instead_of=tables)
    else:
        print(f"encode: nothing new ({summary['rows_out']} works)")
    return summary


def load(settings: Settings, device: str) -> Any:
    """What an actor holds: the VAE, in full precision everywhere, and the tokenizer."""
    import torch

    from momalisa.latents import Autoencoder, load_tokenizer, to_pixels, tokenize
    from momalisa.records import OK
    from ray_jobs._tables import ERROR, Model, open_picture

    autoencoder, tokenizer = Autoencoder.load(settings.diffusion, device), load_tokenizer(settings.diffusion)
    nothing = {"moments": b"", "channels": 0, "height": 0, "width": 0, "token_ids": []}

    class Latents(Model):
        def prepare(self, data: bytes) -> torch.Tensor:
            return to_pixels(open_picture(data), settings.encode.resolution_px)

        def rows(self, ids: list[str], texts: list[str], prepared: list[Any]) -> list[dict[str, Any]]:
            encoded = zip(ids, texts, autoencoder.encode(torch.stack(prepared)), tokenize(tokenizer, texts), strict=True)
            return [self.row(*item) for item in encoded]

        def row(self, id: str, text: str, moments: torch.Tensor, token_ids: torch.Tensor) -> dict[str, Any]:
            if not moments.isfinite().all():
                return self.failed(id, text, "its latents are not finite")
            channels, height, width = autoencoder.channels, *moments.shape[-2:]
            shape = {"channels": channels, "height": height, "width": width}
            values = moments.numpy().astype("<f2").tobytes()
            found = {"moments": values, "caption": text, "token_ids": token_ids.tolist()}
            return {"id": id, **found, **shape, "status": OK, "error": ""}

        def failed(self, id: str, text: str, error: str) -> dict[str, Any]:
            return {"id": id, "caption": text, **nothing, "status": ERROR, "error": error}

    return Latents()


def main() -> None:
    job(__doc__, "encode", run, lambda done: f"{done['new']} new, {done['rejected']} failed, {done['seconds']:.0f} s")


if __name__ == "__main__":
    main()
