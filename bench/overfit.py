"""Overfitting on purpose: 24 pictures, twenty times too long. Is the best an early checkpoint, and does the copy gate fire?

    python bench/overfit.py [--root out/overfit] [--works 57] [--usual 1408] [--threads 2]

24 of 57 works of the miniature museum are trained on, the others are held out. `make demo` shows each work 65 times, which is
1,408 images here; twenty times that is 1,173 times each. Then the checkpoints at 1, 2, 5 and 20 times `--usual` are measured as
the promote job does. Resumable: started again with the same root, it goes on. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import torch

from momalisa import promotion
from momalisa.captioner import Captioner, captioner_id
from momalisa.collect.phash import look
from momalisa.config import Settings, from_file
from momalisa.dataset import Dataset
from momalisa.latents import Autoencoder, encoder_id, load_tokenizer, to_pixels, tokenize
from momalisa.miniature import wing
from momalisa.promotion import explain
from momalisa.promotion.panel import Panel
from momalisa.records import IMAGES, LATENTS, OK, Artwork
from momalisa.training import run as runs
from momalisa.training.loop import Events, Trainer

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
WORKS = 57  # of which 24 are trained on, by the hash of their ids; of 50, 20
USUAL = 1408  # images: about as often as the demo shows a work
TIMES = 20
SHOWN = (1, 2, 5, 20)  # checkpoints that are looked at, in times the usual length


def settings(root: str, usual: int) -> Settings:
    options = {
        "name": "overfit",
        "root": root,
        "train.held_out_fraction": 0.5,
        "train.images": TIMES * usual,
        "train.checkpoint_every_images": usual,
        "train.schedule": "constant",
        "train.workers": 1,
        "promote.distance_pictures": 0,
        "promote.measure_all": "true",
    }
    return from_file(str(CONFIG), [f"--{name}={value}" for name, value in options.items()])


def lay(chosen: Settings, count: int) -> None:
    """Publish the works with captions and latents, as collect, caption and encode would."""
    dataset, encoder = Dataset(chosen.dataset), encoder_id(chosen, captioner_id(chosen))
    if dataset.latest().latents:
        return
    pictures = {f"w{exhibit.record['ObjectID']}": wing.hung(exhibit.scene, exhibit.seed) for exhibit in wing.exhibits()[:count]}
    texts = Captioner.load(chosen.caption).caption(list(pictures.values()))
    autoencoder, tokenizer = Autoencoder.load(chosen.diffusion), load_tokenizer(chosen.diffusion)
    works, latents = [], []
    for (id, picture), text in zip(pictures.items(), texts, strict=True):
        sink, seen = io.BytesIO(), look(picture)
        picture.save(sink, "PNG")
        width, height = picture.size
        work = Artwork(id, bytes=sink.getvalue(), width=width, height=height, phash=seen.phash, thumbnail=seen.thumbnail)
        works.append(work.row())
        moments = autoencoder.encode(to_pixels(picture, chosen.encode.resolution_px)[None])[0]
        row: dict[str, Any] = {"id": id, "caption": text, "token_ids": tokenize(tokenizer, [text])[0].tolist(), "status": OK}
        row |= {"error": "", "moments": moments.numpy().astype("<f2").tobytes()}
        latents.append(row | dict(zip(("channels", "height", "width"), (len(moments) // 2, *moments.shape[1:]), strict=True)))
    tables = [dataset.put_rows(f"latents/{encoder}", latents, LATENTS)]
    images = [dataset.put_rows("images", works, IMAGES)]
    dataset.publish(dataset.latest().with_images(images).with_latents(encoder, tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="out/overfit")
    parser.add_argument("--works", type=int, default=WORKS)
    parser.add_argument("--usual", type=int, default=USUAL, help="images of a run of the usual length")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = settings(options.root, options.usual)
    lay(chosen, options.works)
    planned = runs.plan(chosen)
    training, _ = runs.split(chosen, planned)
    Trainer(runs.load(chosen, planned), Events(checkpointed=lambda checkpoint: print(checkpoint.name, flush=True))).train()
    found = [one for one in promotion.candidates(chosen, planned) if one.images_seen // options.usual in SHOWN]
    decision = Panel(chosen, planned, found).decide()
    print(explain.table(chosen.promote, decision))
    print(explain.write(chosen, planned, decision))
    last = decision.candidates[-1]
    figures = {
        "claim": f"{len(training)} works, {TIMES} times {options.usual} images: the best is early, late ones are copies",
        "best_images_seen": decision.best.checkpoint.images_seen if decision.best and decision.best.checkpoint else None,
        "last_images_seen": chosen.train.images,
        "copy_rate_best": decision.best.copies.share if decision.best and decision.best.copies else None,
        "copy_rate_last": last.copies.share if last.copies else None,
        "heldout_loss_best": decision.best.loss if decision.best else None,
        "heldout_loss_last": last.loss,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
