"""Captions a second beside transformers' eager `generate`, in one run: same weights, pictures, batch and tokens.

    python bench/caption.py                                        # the miniature, this CPU
    python bench/caption.py --full-size --batch 4                  # BLIP-base's size, random weights
    python bench/caption.py --full-size --device cuda --batch 64 --precision fp16 --record

The last line is the whole of it on a machine with a GPU: it wants this checkout and a CUDA build of torch 2.13 beside
transformers, numpy, pillow, pydantic and pyarrow, and neither Ray, nor a cluster, nor downloaded weights. `--peer-precision`
is `--precision` unless given, so both sides compute alike.

Both sides start from uint8 squares in memory and end with token ids on the CPU; they take turns, and the median of
each counts. The miniature ends its captions by itself. Random weights hardly ever end one: at full size both sides
write `--tokens` words for every picture, and a run where a row ended is refused. Before anything is timed, what ours says is
compared with what the peer says, both in fp32: in 16 bits the sums of either may tip a word. The last line printed is one JSON
object.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from results import parser, processor, report

PRECISIONS = ("fp32", "bf16", "fp16")


def blip(full_size: bool) -> Any:
    """The miniature's weights, or BLIP-base's architecture with random ones."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration

    from momalisa.weights import MINIATURE

    if not full_size:
        return BlipForConditionalGeneration.from_pretrained(MINIATURE / "blip", dtype=torch.float32)
    text = {"vocab_size": 30524, "num_attention_heads": 12, "bos_token_id": 30522, "sep_token_id": 102, "pad_token_id": 0}
    torch.manual_seed(0)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config={"initializer_range": 0.02}))


def pictures(count: int, size_px: int) -> Any:
    """[B, S, S, 3] uint8."""
    import numpy as np
    import torch

    from momalisa.miniature import draw
    from momalisa.square import Square

    scenes, square = draw.all_scenes(), Square(size_px)
    drawn = [draw.draw(scenes[number * 37 % len(scenes)], seed=number) for number in range(count)]
    return torch.from_numpy(np.stack([square(picture) for picture in drawn]))


def sides(options: argparse.Namespace) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]:
    """Ours and the peer's, each a call that captions one batch, and what was found when they were compared."""
    import torch
    from transformers import BlipImageProcessorPil

    from momalisa.captioner import DTYPES
    from momalisa.captioner.agreement import agreement
    from momalisa.captioner.decoder import Decoder
    from momalisa.captioner.vision import VisionTower

    processor = BlipImageProcessorPil()
    device, size_px = torch.device(options.device), 384 if options.full_size else 128

    def build(precision: str) -> tuple[Any, VisionTower, Decoder]:
        model = blip(options.full_size).eval().requires_grad_(False).to(device, DTYPES[precision])
        vision = VisionTower(model.vision_model, processor.image_mean, processor.image_std)
        return model, vision, Decoder(model.text_decoder, vision.tokens, options.tokens, options.batch)

    squares = pictures(options.batch, size_px)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32
    found = agreement(*build("fp32"), squares)
    print(f"in fp32: {found}", file=sys.stderr, flush=True)
    model, peer_vision, _ = build(options.peer_precision)
    _, vision, decoder = build(options.precision)

    def ours() -> Any:
        return decoder(vision(squares))

    def peer() -> Any:
        pixels = peer_vision.normalised(squares.to(device))
        return model.generate(pixel_values=pixels, max_new_tokens=options.tokens, do_sample=False, num_beams=1).cpu()

    for ids in (ours(), peer()):  # a warm-up too
        if options.full_size and (ids[:, -options.tokens :] == decoder.end_id).any():
            raise SystemExit("a caption ended before its last token, so the sides did not do the same work; try other --tokens")
    return ours, peer, vars(found)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    ours, peer, found = sides(options)
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    with torch.inference_mode():
        for turn in range(options.rounds):
            for side, call in (("ours", ours), ("peer", peer)):
                began = time.perf_counter()
                call()
                times[side].append(time.perf_counter() - began)
            print(f"round {turn + 1}: " + ", ".join(f"{side} {options.batch / took[-1]:.2f}/s" for side, took in times.items()),
                  file=sys.stderr, flush=True)  # fmt: skip
    rates = {side: options.batch / median(took) for side, took in times.items()}
    what = "BLIP-base with random weights, 384x384" if options.full_size else "miniature BLIP, 128x128"
    words = f"{options.tokens} tokens each" if options.full_size else f"{options.tokens} tokens at most"
    return {
        "claim": f"captions/s, {what}, batch {options.batch}, {words}; "
        f"ours {options.precision} against transformers' eager generate {options.peer_precision}",
        "ours": round(rates["ours"], 2),
        "peer": round(rates["peer"], 2),
        "ratio": round(rates["ours"] / rates["peer"], 2),
        "hardware": hardware(options),
        "agreement in fp32": found,
        "bound": bound(options),
    }


def bound(options: argparse.Namespace) -> str:
    """What keeps the figure from being higher."""
    if not options.full_size:
        return "the matrix products of a tiny vision tower, which both sides share; what is saved is work between them"
    where = "this CPU's" if options.device == "cpu" else "the GPU's"
    return f"the vision tower and the keys and values of its states: 127 GFLOP a picture, at {where} {options.precision} rate"


def hardware(options: argparse.Namespace) -> str:
    import torch

    if options.device != "cpu":
        return str(torch.cuda.get_device_name())
    return f"{options.threads} threads of {os.cpu_count()} x {processor()}"


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--full-size", action="store_true", help="BLIP-base's architecture with random weights")
    command.add_argument("--device", default="cpu", help="cpu or cuda; a GPU replays the decoder's steps as CUDA graphs")
    command.add_argument("--batch", type=int, default=32)
    command.add_argument("--tokens", type=int, help="new tokens at most (default: 40, at full size 16)")
    command.add_argument("--precision", choices=PRECISIONS, default="fp32", help="ours")
    command.add_argument("--peer-precision", choices=PRECISIONS, help="transformers' (default: ours)")
    command.add_argument("--threads", type=int, default=os.cpu_count())
    command.add_argument("--rounds", type=int, default=5)
    options = command.parse_args()
    options.tokens = options.tokens or (16 if options.full_size else 40)
    options.peer_precision = options.peer_precision or options.precision
    report(measure(options), options.record)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
