"""Training speed beside diffusers' `train_text_to_image.py`, in one run: same model, pictures, batch, steps.

    python bench/train.py --script ../diffusers/examples/text_to_image/train_text_to_image.py
    python bench/train.py --script ... --peer-precision fp32 --compile --record
    python bench/train.py --script ... --size sd14 --batch 16 --compile --ladder --record        # on a GPU, without Ray
    python bench/train.py --scaling                                                             # 2 workers against 1

The script is read from a checkout of diffusers (0.42 or its main branch); it wants torchvision. Both sides run as programs
of their own, twice: a short and a long run. The difference of their times over the difference of their steps is the time
of a step, so that loading and saving are left out on both sides. Ours trains on latents that were encoded before, as
the encode job does; the script encodes each picture with the VAE at every step. `cpu_ratio` is the same ratio of processor
seconds, for machines that are busy with other things too. `--ladder` switches our optimisations on one after another.
`--size sd14` is Stable Diffusion 1.4's architecture at 512x512 with random weights. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import socket
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


def make_pictures(folder: Path, resolution: int) -> None:
    """An imagefolder of drawings with their captions."""
    from momalisa.miniature import draw

    rng = random.Random(1929)
    folder.mkdir(parents=True)
    lines = []
    for number in range(PICTURES):
        scene = draw.sample_scene(rng)
        picture = draw.draw(scene, number)
        picture.resize((resolution, resolution)).save(folder / f"moma_{number}.png")
        lines.append(json.dumps({"file_name": f"moma_{number}.png", "text": PROMPT + scene.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def make_sd14(folder: Path) -> None:
    """A pipeline with random weights in the sizes of Stable Diffusion 1.4."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from momalisa.miniature import models
    from momalisa.training.memory import SD_1_UNET, build

    tokenizer = models.build_clip_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **text, **special))
    models.save_diffusion(folder, vae, build(SD_1_UNET), encoder, tokenizer)


def ours(options: argparse.Namespace) -> None:
    """Our side, in a process of its own: encode, then train for so many steps; the last line says how it went."""
    import torch
    from PIL import Image

    from momalisa.config import Diffusion, Train
    from momalisa.latents import Autoencoder, TextEncoder, to_pixels
    from momalisa.storage import Store
    from momalisa.training.cache import LatentCache
    from momalisa.training.loop import Events, Run, Trainer

    torch.set_num_threads(options.threads)
    if options.workers > 1:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    diffusion = Diffusion(model=options.model)
    rows = [json.loads(line) for line in (options.data / "metadata.jsonl").read_text().splitlines()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = Autoencoder.load(diffusion, device)
    moments = []
    for start in range(0, len(rows), 8):
        pictures = [Image.open(options.data / row["file_name"]) for row in rows[start : start + 8]]
        moments += list(autoencoder.encode(torch.stack([to_pixels(picture, options.resolution) for picture in pictures])))
    del autoencoder
    texts = [row["text"] for row in rows]
    tokens = TextEncoder.load(diffusion).tokenize(texts)
    train = Train(
        images=options.steps * options.batch,
        batch=options.batch,
        micro_batch=options.micro_batch,
        workers=options.workers,
        precision=options.precision,
        compile=options.compile,
        optimizer=options.optimizer,
        gradient_checkpointing=options.gradient_checkpointing,
        evaluate_every_steps=10**9,
        evaluation_prompts=(),
        checkpoint_every_images=10**9,
    )
    said: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cache = LatentCache([row["file_name"] for row in rows], texts, moments, tokens)
        trainer = Trainer(Run("bench", train, diffusion, cache, Store(scratch)), Events(logged=said.update), options.workers)
        snapshot = trainer.snapshot

        def timed() -> Any:
            began = time.monotonic()
            made = snapshot()
            said["checkpoint_stall_s"] = time.monotonic() - began
            return made

        trainer.snapshot = timed  # type: ignore[method-assign]
        trainer.train()
    print(json.dumps({key: said[key] for key in FIGURES if key in said}))


FIGURES = ("images_per_s", "data_wait_fraction", "peak_memory_gib", "mfu", "checkpoint_stall_s")


def our_command(options: argparse.Namespace, steps: int) -> list[str]:
    same = [f"--model={options.model}", f"--data={options.data}", f"--batch={options.batch}", f"--threads={options.threads}"]
    same += [f"--resolution={options.resolution}", f"--precision={options.precision}", f"--steps={steps}"]
    same += [f"--optimizer={options.optimizer}", f"--workers={options.workers}"]
    same += [f"--micro-batch={options.micro_batch}"] if options.micro_batch else []
    same += ["--compile"] if options.compile else []
    same += ["--gradient-checkpointing"] if options.gradient_checkpointing else []
    return [sys.executable, str(HERE), "--side=ours", *same]


def peer_command(options: argparse.Namespace, steps: int, scratch: Path) -> list[str]:
    import torch

    precision = {"fp32": "no"}.get(options.peer_precision, options.peer_precision)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", f"--mixed_precision={precision}"]
    launch += [] if torch.cuda.is_available() else ["--cpu"]
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
        "dataloader_num_workers": 0 if not torch.cuda.is_available() else 8,
        "seed": 0,
        "mixed_precision": precision,
        "output_dir": scratch / f"peer-{steps}",
        "cache_dir": scratch / "cache",
    }
    listed = [f"--{key}={value}" for key, value in flags.items()]
    listed += ["--gradient_checkpointing"] if options.gradient_checkpointing else []
    return [*launch, str(options.script), *listed, "--use_ema", "--foreach_ema"]


def program(side: str, line: list[str], options: argparse.Namespace) -> tuple[float, float, str]:
    """Run one side: seconds by the clock, seconds of processors, and what it printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(options.workers)}
    environment = {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(options.workers)]
    processes = [
        subprocess.Popen(
            line,
            env={**environment, **(rank if options.workers > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{side} failed:\n" + "\n".join(text[-3000:] for text in printed))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, busy, printed[0]


def steps_s(options: argparse.Namespace, side: str, scratch: Path) -> tuple[float, float, dict[str, float]]:
    """Seconds of a step by the clock and of processors, and what our side says of its long run."""
    found, told = [], {}
    for steps in (options.short, options.short + options.more):
        line = our_command(options, steps) if side == "ours" else peer_command(options, steps, scratch)
        clock, busy, printed = program(side, line, options)
        found.append((clock, busy))
        if side == "ours":
            told = json.loads(printed.strip().splitlines()[-1])
    return (found[1][0] - found[0][0]) / options.more, (found[1][1] - found[0][1]) / options.more, told


def prepare(options: argparse.Namespace, scratch: Path) -> None:
    options.data = scratch / "pictures" / "train"
    make_pictures(options.data, options.resolution)
    if options.size == "sd14":
        options.model = str(scratch / "sd14")
        make_sd14(Path(options.model))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    clocks: dict[str, list[float]] = {"ours": [], "peer": []}
    processors: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepare(options, scratch)
        for turn in range(options.rounds):
            for side in ("ours", "peer"):
                clock, busy, told = steps_s(options, side, scratch)
                clocks[side].append(clock)
                processors[side].append(busy)
                said = {key: round(value, 4) for key, value in told.items()}
                print(f"round {turn + 1}: {side} {options.batch / clock:.1f} images/s {said or ''}", file=sys.stderr, flush=True)
        rungs = ladder(options, scratch, median(clocks["peer"])) if options.ladder else []
    rates = {side: options.batch / median(values) for side, values in clocks.items()}
    how = f"{options.precision}{', compiled' if options.compile else ''}"
    what = "miniature UNet" if options.size == "miniature" else "UNet of Stable Diffusion 1.4 with random weights"
    return {
        "claim": f"training, {what}, {options.resolution}x{options.resolution}, batch {options.batch}, images/s; "
        f"ours {how} against train_text_to_image.py {options.peer_precision}",
        "ours": round(rates["ours"], 1),
        "peer": round(rates["peer"], 1),
        "ratio": round(rates["ours"] / rates["peer"], 2),
        "cpu_ratio": round(median(processors["peer"]) / median(processors["ours"]), 2),
        "hardware": f"{options.threads} threads of {os.cpu_count()} x {processor()}",
        **({"ladder": rungs} if rungs else {}),
    }


def ladder(options: argparse.Namespace, scratch: Path, peer_s: float) -> list[dict[str, Any]]:
    """Our side with each optimisation added to those before it."""
    rungs = [{"precision": "fp32", "compile": False}, {"precision": "bf16"}, {"compile": True}, {"optimizer": "adamw8bit"}]
    chosen, found = argparse.Namespace(**vars(options)), []
    for change in rungs:
        vars(chosen).update(change)
        clock, _, told = steps_s(chosen, "ours", scratch)
        rung = {
            **change,
            "images_per_s": round(options.batch / clock, 1),
            "ratio": round(peer_s / clock, 2),
            "mfu": told.get("mfu"),
        }
        print(f"ladder: {rung}", file=sys.stderr, flush=True)
        found.append(rung)
    return found


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Two workers with half the threads each against one with half the threads: 1 is perfect."""
    options.threads = max(1, options.threads // 2)
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))
        one, _, _ = steps_s(options, "ours", Path(folder))
        options.workers = 2
        two, _, _ = steps_s(options, "ours", Path(folder))
    return {
        "claim": f"training, 2 workers against 1, {options.threads} threads each, batch {options.batch}, images/s",
        "ours": round(options.batch / two, 1),
        "peer": round(options.batch / one, 1),
        "ratio": round(one / two, 2),
        "hardware": f"{options.threads} threads a worker of {os.cpu_count()} x {processor()}",
    }


def main() -> None:
    from momalisa.weights import MINIATURE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, help="diffusers' examples/text_to_image/train_text_to_image.py")
    parser.add_argument("--model", default=str(MINIATURE / "diffusion"))
    parser.add_argument("--size", choices=("miniature", "sd14"), default="miniature")
    parser.add_argument("--resolution", type=int, help="default: 128, or 512 for sd14")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="ours")
    parser.add_argument("--peer-precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="ours compiled")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="ours")
    parser.add_argument("--ladder", action="store_true", help="then our optimisations one after another")
    parser.add_argument("--scaling", action="store_true", help="only ours: two workers against one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--short", type=int, default=5, help="steps of the short run")
    parser.add_argument("--more", type=int, default=30, help="further steps of the long run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append a row to bench/RESULTS.md")
    parser.add_argument("--side", choices=("ours",), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.resolution = options.resolution or (512 if options.size == "sd14" else 128)
    if options.side:
        ours(options)
        return
    if not options.scaling and (options.script is None or not options.script.is_file()):
        parser.error(f"--script {options.script}: give the path of train_text_to_image.py in a checkout of diffusers")
    report(scaling(options) if options.scaling else measure(options), options.record)


if __name__ == "__main__":
    main()
