"""Overfitting on purpose: 24 pictures, twenty times too long. Is the best an early checkpoint, and does the copy gate fire?

    python bench/overfit.py [--root out/overfit] [--works 57] [--usual 1216] [--threads 2] [--record]

24 of 57 works of the miniature museum are trained on, the others are held out. `--usual` shows each work 51 times (`make
demo`: 65 times); twenty times that is 1,013 times each. Then the checkpoints at 0.5, 1, 2, 5 and 20 times `--usual` are measured
as the promote job does, on half as many general captions: those settle nothing here. Resumable: started again with the same
root, it goes on. The last line printed is one JSON object.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from results import parser, processor, report

from momalisa import promotion
from momalisa.captioner import Captioner, captioner_id
from momalisa.collect.phash import look
from momalisa.config import Settings, from_file
from momalisa.dataset import Dataset
from momalisa.latents import Autoencoder, encoder_id, load_tokenizer, to_pixels, tokenize
from momalisa.miniature import wing
from momalisa.promotion import explain
from momalisa.promotion.decision import Decision
from momalisa.promotion.panel import Panel
from momalisa.records import IMAGES, LATENTS, OK, Artwork
from momalisa.training import run as runs
from momalisa.training.loop import Events, Trainer

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
WORKS = 57  # of which 24 are trained on, by the hash of their ids; of 50, 20
USUAL = 1216  # images
TIMES = 20
SHOWN = (0.5, 1, 2, 5, 20)  # checkpoints that are looked at, in times the usual length
EARLY = 5  # the best is expected no later, in times the usual length


def settings(root: str, usual: int) -> Settings:
    options = {
        "name": "overfit",
        "root": root,
        "train.held_out_fraction": 0.5,
        "train.images": TIMES * usual,
        "train.checkpoint_every_images": usual // 2,
        "train.schedule": "constant",
        "train.workers": 1,
        "promote.distance_pictures": 0,
        "promote.general_pictures": 24,
        "promote.batch": 48,  # all pictures of a gate at once
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


@contextmanager
def timed(seconds: dict[str, list[float]], what: str) -> Iterator[None]:
    """Seconds by the clock, and of processors, which a busy machine does not change."""
    began, before = time.monotonic(), time.process_time()
    yield
    seconds[what] = [round(time.monotonic() - began, 1), round(time.process_time() - before, 1)]
    print(f"{what}: {seconds[what][0]:g} s, {seconds[what][1]:g} s of processors", flush=True)


def figures(chosen: Settings, decision: Decision, training: int, usual: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What was found; `shown`: whether the best is early, and the last one fails because it copies."""
    best, last = decision.best, decision.candidates[-1]
    early = best is not None and best.checkpoint is not None and best.checkpoint.images_seen <= EARLY * usual
    fires = last.copies is not None and last.copies.low > chosen.promote.copy_rate
    return {
        "claim": f"overfitting: held-out loss of what promote chooses; peer: {training} works trained on {TIMES} times too long",
        "ours": round(best.loss, 4) if best else None,
        "peer": round(last.loss, 4),
        "ratio": round(last.loss / best.loss, 2) if best else None,
        "hardware": f"{torch.get_num_threads()} threads of {os.cpu_count()} x {processor()}",
        "shown": early and fires,
        "best_images_seen": best.checkpoint.images_seen if best and best.checkpoint else None,
        "last_images_seen": chosen.train.images,
        "copy_rate_best": best.copies.share if best and best.copies else None,
        "copy_rate_last": last.copies.share if last.copies else None,
        "copy_rate_allowed": chosen.promote.copy_rate,
        "seconds": seconds,
    }


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--root", default="out/overfit")
    options_parser.add_argument("--works", type=int, default=WORKS)
    options_parser.add_argument("--usual", type=int, default=USUAL, help="images of a run of the usual length")
    options_parser.add_argument("--threads", type=int, default=2)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen, seconds = settings(options.root, options.usual), dict[str, list[float]]()
    with timed(seconds, "lay"):
        lay(chosen, options.works)
    planned = runs.plan(chosen)
    training, _ = runs.split(chosen, planned)
    with timed(seconds, "train"):
        Trainer(runs.load(chosen, planned), Events(checkpointed=lambda checkpoint: print(checkpoint.name, flush=True))).train()
    found = [one for one in promotion.candidates(chosen, planned) if one.images_seen / options.usual in SHOWN]
    with timed(seconds, "measure"):
        decision = Panel(chosen, planned, found).decide()
    print(explain.table(chosen.promote, decision))
    print(explain.write(chosen, planned, decision))
    report(figures(chosen, decision, len(training), options.usual, seconds), options.record)


if __name__ == "__main__":
    main()
