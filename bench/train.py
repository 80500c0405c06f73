"""Training speed beside diffusers' `train_text_to_image.py`, in one run: same model, pictures, batch, steps.

    python bench/train.py --script ../diffusers/examples/text_to_image/train_text_to_image.py
    python bench/train.py --script ... --peer-precision fp32 --compile --record

The script is read from a checkout of diffusers (0.42 or its main branch); it wants torchvision. Both sides run as programs
of their own, twice: a short and a long run. The difference of their times over the difference of their steps is the time
of a step, so that loading and saving are left out on both sides. Ours trains on latents that were encoded before, as
the encode job does; the script encodes each picture with the VAE at every step. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from results import processor, report

HERE = Path(__file__).resolve()
PICTURES = 256
PROMPT = "A MOMA artwork of: "


def make_pictures(folder: Path) -> None:
    """An imagefolder of drawings with their captions."""
    from momalisa.miniature import draw

    rng = random.Random(1929)
    folder.mkdir(parents=True)
    lines = []
    for number in range(PICTURES):
        scene = draw.sample_scene(rng)
        draw.draw(scene, number).save(folder / f"moma_{number}.png")
        lines.append(json.dumps({"file_name": f"moma_{number}.png", "text": PROMPT + scene.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def ours(options: argparse.Namespace) -> None:
    """Our side, in a process of its own: encode, then train for so many steps in a single process."""
    import torch
    from PIL import Image

    from momalisa.config import Diffusion, Train
    from momalisa.latents import Autoencoder, TextEncoder, to_pixels
    from momalisa.storage import Store
    from momalisa.training.cache import LatentCache
    from momalisa.training.loop import Events, Run, Trainer

    torch.set_num_threads(options.threads)
    diffusion = Diffusion(model=options.model)
    rows = [json.loads(line) for line in (options.data / "metadata.jsonl").read_text().splitlines()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = Autoencoder.load(diffusion, device)
    moments = []
    for start in range(0, len(rows), 32):
        pictures = [Image.open(options.data / row["file_name"]) for row in rows[start : start + 32]]
        moments += list(autoencoder.encode(torch.stack([to_pixels(picture, options.resolution) for picture in pictures])))
    texts = [row["text"] for row in rows]
    tokens = TextEncoder.load(diffusion).tokenize(texts)
    train = Train(
        images=options.steps * options.batch,
        batch=options.batch,
        micro_batch=options.micro_batch,
        workers=1,
        precision=options.precision,
        compile=options.compile,
        gradient_checkpointing=options.gradient_checkpointing,
        evaluate_every_steps=10**9,
        evaluation_prompts=(),
        checkpoint_every_images=10**9,
    )
    with tempfile.TemporaryDirectory() as scratch:
        cache = LatentCache([row["file_name"] for row in rows], texts, moments, tokens)
        Trainer(Run("bench", train, diffusion, cache, Store(scratch)), Events()).train()


def command(options: argparse.Namespace, side: str, steps: int, scratch: Path) -> tuple[list[str], dict[str, str]]:
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    if side == "ours":
        same = [f"--model={options.model}", f"--data={options.data}", f"--batch={options.batch}", f"--threads={options.threads}"]
        same += [f"--resolution={options.resolution}", f"--precision={options.precision}", f"--steps={steps}"]
        same += ["--compile"] if options.compile else []
        return [sys.executable, str(HERE), "--side=ours", *same], threads
    precision = {"fp32": "no"}.get(options.peer_precision, options.peer_precision)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", f"--mixed_precision={precision}"]
    flags = {
        "pretrained_model_name_or_path": options.model,
        "train_data_dir": options.data.parent,
        "caption_column": "text",
        "resolution": options.resolution,
        "train_batch_size": options.batch,
        "max_train_steps": steps,
        "learning_rate": 1e-5,
        "lr_scheduler": "constant",
        "snr_gamma": 5.0,
        "max_grad_norm": 1,
        "checkpointing_steps": 10**9,
        "dataloader_num_workers": 0,
        "seed": 0,
        "mixed_precision": precision,
        "output_dir": scratch / f"peer-{steps}",
        "cache_dir": scratch / "cache",
    }
    listed = [f"--{key}={value}" for key, value in flags.items()]
    return [*launch, str(options.script), *listed, "--use_ema", "--foreach_ema"], threads


def seconds(options: argparse.Namespace, side: str, steps: int, scratch: Path) -> float:
    """How long a whole run of one side takes."""
    line, extra = command(options, side, steps, scratch)
    environment = {**os.environ, **extra, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    began = time.monotonic()
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed ({done.returncode}):\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return time.monotonic() - began


def measure(options: argparse.Namespace) -> dict[str, Any]:
    short, long = options.short, options.short + options.more
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        options.data = scratch / "pictures" / "train"
        make_pictures(options.data)
        for turn in range(options.rounds):
            for side in ("ours", "peer"):
                step_s = (seconds(options, side, long, scratch) - seconds(options, side, short, scratch)) / (long - short)
                times[side].append(step_s)
                print(f"round {turn + 1}: {side} {options.batch / step_s:.1f} images/s", file=sys.stderr, flush=True)
    rates = {side: options.batch / median(values) for side, values in times.items()}
    how = f"{options.precision}{', compiled' if options.compile else ''}"
    return {
        "claim": f"training, miniature UNet, {options.resolution}x{options.resolution}, batch {options.batch}, images/s; "
        f"ours {how} against train_text_to_image.py {options.peer_precision}",
        "ours": round(rates["ours"], 1),
        "peer": round(rates["peer"], 1),
        "ratio": round(rates["ours"] / rates["peer"], 2),
        "hardware": f"{options.threads} threads of {os.cpu_count()} x {processor()}",
    }


def main() -> None:
    from momalisa.weights import MINIATURE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, help="diffusers' examples/text_to_image/train_text_to_image.py")
    parser.add_argument("--model", default=str(MINIATURE / "diffusion"))
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="ours")
    parser.add_argument("--peer-precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="ours compiled")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--short", type=int, default=5, help="steps of the short run")
    parser.add_argument("--more", type=int, default=30, help="further steps of the long run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append a row to bench/RESULTS.md")
    parser.add_argument("--side", choices=("ours",), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        ours(options)
        return
    if options.script is None or not options.script.is_file():
        parser.error(f"--script {options.script}: give the path of train_text_to_image.py in a checkout of diffusers")
    report(measure(options), options.record)


if __name__ == "__main__":
    main()
