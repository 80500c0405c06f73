"""What each speed tier saves and what it costs, on the miniature: the table of docs/engine.md.

    python bench/tiers.py                      240 prompts that no model was trained on
    python bench/tiers.py --prompts 40

`rows`: UNet rows a picture, all steps together, as a share of the full tier's: the work, on any machine. `subject` and
`caption`: how often BLIP names the very subject, and says the very caption, that was asked for. `psnr_db`: how near a
picture is to the full tier's of the same seed. One line of JSON for a tier; the last is one object with all of them.
"""

from __future__ import annotations

import argparse
import json
from typing import get_args

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    options = parser.parse_args()
    from momalisa.captioner import Captioner
    from momalisa.config import Caption, Diffusion
    from momalisa.engine import Engine, Request
    from momalisa.engine.tiers import Tier, at_tier
    from momalisa.miniature import draw
    from momalisa.miniature.evaluate import agreement, read

    prompts = [scene.caption for scene in draw.held_out_scenes()[: options.prompts]]
    asked = [
        Request(prompt, seed=seed, steps=options.steps, guidance_scale=options.guidance_scale, size_px=draw.SIZE_PX)
        for seed, prompt in enumerate(prompts)
    ]
    engine = Engine.load(Diffusion(model="miniature://diffusion"), dtype=torch.bfloat16)
    captioner = Captioner.load(Caption(model="miniature://blip", prefix=""))
    figures: dict[str, dict[str, float]] = {}
    reference: list[np.ndarray] = []
    for tier in get_args(Tier):
        requests = [at_tier(request, tier) for request in asked]
        engine.submit(requests[0])
        rows = engine.pending_row_steps / (2 * options.steps)
        while not engine.idle:
            engine.tick()
        pictures = engine.generate(requests)
        exact, subject = agreement(read(captioner, pictures), prompts)
        pixels = [np.asarray(picture, np.float64) for picture in pictures]
        reference = reference or pixels
        errors = [max(float(np.square(a - b).mean()), 1e-9) for a, b in zip(pixels, reference, strict=True)]
        psnr_db = float(np.mean(10 * np.log10(255**2 / np.array(errors))))
        figures[tier] = {"rows": rows, "subject": subject, "caption": exact} | ({"psnr_db": psnr_db} if tier != "full" else {})
        figures[tier] = {name: round(value, 3) for name, value in figures[tier].items()}
        print(json.dumps({tier: figures[tier]}), flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
