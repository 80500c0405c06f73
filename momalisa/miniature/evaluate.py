"""Measure the miniature models on drawings and prompts that training never saw.

    python -m momalisa.miniature.evaluate [--sheet out/evaluation.png]

Prints progress, then one line of JSON: `vae_psnr_db` (mean over 500 drawings), `blip_exact` (share of exact captions
over the same), `blip_wing_exact` and `blip_wing_subject` (the same over 200 works of the wing's style, which no model saw),
`clip_top1` (right caption first among 64), `t2i_exact` and `t2i_subject` (300 held-out prompts drawn in 25 steps at most;
BLIP reads back the very caption, or the right subject).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from momalisa.captioner import Captioner
from momalisa.config import Caption, Diffusion
from momalisa.contact_sheet import contact_sheet
from momalisa.engine import Engine, Request
from momalisa.latents import Autoencoder, sample, to_pictures, to_pixels
from momalisa.miniature import draw
from momalisa.miniature.wing import further_works
from momalisa.weights import MINIATURE

SEED = 20_000_000_000  # beyond the 32 bits that training draws from
BATCH = 50
CANDIDATES = 64


def unseen_drawings(count: int) -> tuple[list[Image.Image], list[str]]:
    """Drawings from seeds that training never uses, of any scene, held-out ones among them."""
    rng = random.Random(SEED)
    scenes = [draw.sample_scene(rng, draw.all_scenes()) for _ in range(count)]
    return [draw.draw(scene, SEED + i) for i, scene in enumerate(scenes)], [scene.caption for scene in scenes]


def pieces(count: int, size: int, label: str) -> Iterator[slice]:
    """Slices of `size` over `count`, saying how far."""
    for start in range(0, count, size):
        yield slice(start, start + size)
        print(f"{label}: {min(start + size, count)}/{count}", file=sys.stderr, flush=True)


def vae_psnr_db(autoencoder: Autoencoder, pictures: Sequence[Image.Image]) -> float:
    """Mean peak signal-to-noise ratio of 8-bit reconstructions, 10 log10(255^2 / mse), in dB."""
    values = []
    for part in pieces(len(pictures), BATCH, "vae"):
        originals = pictures[part]
        moments = autoencoder.encode(torch.stack([to_pixels(picture, draw.SIZE_PX) for picture in originals]))
        mean = torch.zeros_like(moments[:, : autoencoder.channels], dtype=torch.float32)
        decoded = to_pictures(autoencoder.decode(sample(moments, mean, autoencoder.scaling_factor)))
        for original, copy in zip(originals, decoded, strict=True):
            mse = np.square(np.asarray(original, dtype=np.float64) - np.asarray(copy, dtype=np.float64)).mean()
            values.append(10 * np.log10(255**2 / max(mse, 1e-9)))
    return float(np.mean(values))


def read(captioner: Captioner, pictures: Sequence[Image.Image]) -> list[str]:
    """What BLIP says of pictures, in the captions' own spelling."""
    texts: list[str] = []
    for part in pieces(len(pictures), BATCH, "blip"):
        texts += captioner.caption(pictures[part])
    return [text.replace(" ,", ",") for text in texts]


def agreement(said: Sequence[str], captions: Sequence[str]) -> tuple[float, float]:
    """Shares of texts that are the very caption, and that name its subject."""
    pairs = list(zip(said, captions, strict=True))
    exact = float(np.mean([a == b for a, b in pairs]))
    return exact, float(np.mean([draw.subject_of(a) == draw.subject_of(b) for a, b in pairs]))


@torch.no_grad()
def clip_top1(directory: str, rounds: int = 8) -> float:
    """Share of drawings whose own caption is the nearest of 64."""
    model, processor = CLIPModel.from_pretrained(directory, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(directory)
    rng, right = random.Random(SEED + 1), 0
    for _ in pieces(rounds, 1, "clip"):
        scenes = rng.sample(draw.all_scenes(), CANDIDATES)
        pictures = [draw.draw(scene, SEED + rng.getrandbits(32)) for scene in scenes]
        inputs = processor(text=[scene.caption for scene in scenes], images=pictures, padding=True, return_tensors="pt")
        right += int((model(**inputs).logits_per_image.argmax(1) == torch.arange(CANDIDATES)).sum())
    return right / (rounds * CANDIDATES)


def text_to_image(engine: Engine, prompts: Sequence[str], steps: int, guidance_scale: float) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    for part in pieces(len(prompts), BATCH, "text-to-image"):
        first = part.start
        requests = [
            Request(prompt, seed=first + i, steps=steps, guidance_scale=guidance_scale, size_px=draw.SIZE_PX)
            for i, prompt in enumerate(prompts[part])
        ]
        pictures += engine.generate(requests)
    return pictures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m momalisa.miniature.evaluate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--weights", type=Path, default=MINIATURE, help="a folder with diffusion/, blip/ and clip/")
    parser.add_argument("--drawings", type=int, default=500)
    parser.add_argument("--works", type=int, default=200, help="of the wing")
    parser.add_argument("--prompts", type=int, default=draw.HELD_OUT_COUNT)
    parser.add_argument("--steps", type=int, default=20, choices=range(1, 26), metavar="1..25")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path, help="also write the generated pictures as a contact sheet")
    options = parser.parse_args(arguments)
    diffusion = Diffusion(model=str(options.weights / "diffusion"))
    captioner = Captioner.load(Caption(model=str(options.weights / "blip"), prefix=""))
    engine = Engine.load(diffusion)
    pictures, captions = unseen_drawings(options.drawings)
    prompts = [scene.caption for scene in draw.held_out_scenes()[: options.prompts]]
    drawn = text_to_image(engine, prompts, options.steps, options.guidance_scale)
    works = further_works(options.works, seed=3)
    wing_exact, wing_subject = agreement(read(captioner, [work for _, work in works]), [caption for caption, _ in works])
    t2i_exact, t2i_subject = agreement(read(captioner, drawn), prompts)
    figures = {
        "vae_psnr_db": vae_psnr_db(engine.autoencoder, pictures),
        "blip_exact": agreement(read(captioner, pictures), captions)[0],
        "blip_wing_exact": wing_exact,
        "blip_wing_subject": wing_subject,
        "clip_top1": clip_top1(str(options.weights / "clip")),
        "t2i_exact": t2i_exact,
        "t2i_subject": t2i_subject,
    }
    if options.sheet:
        rows = [("; ".join(prompts[i : i + 8]), drawn[i : i + 8]) for i in range(0, min(len(drawn), 80), 8)]
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows).save(options.sheet)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
