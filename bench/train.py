"""Training speed beside diffusers' `train_text_to_image.py`, in one run: same model, pictures, batch, steps.

    python bench/train.py --script ../diffusers/examples/text_to_image/train_text_to_image.py
    python bench/train.py --script ... --peer-precision fp32 --compile --record
    python bench/train.py --script ... --peer-precision fp32 --compile --ladder --record         # what each optimisation adds
    python bench/train.py --script ... --size sd14 --batch 16 --micro-batch 4 --compile --ladder --rounds 1 --record   # on a GPU
    python bench/train.py --scaling                                                             # 2 workers against 1

The script is read from a checkout of diffusers (0.42 or its main branch); it wants torchvision. Each side runs as a program
of its own, turn about for `--rounds` rounds. A hook that torch calls after every optimizer's step reads the clock and the
process's processor seconds; the first `--warmup` steps (loading, compiling) are left out on both sides. `ratio` is the median
over the rounds; `cpu_ratio` is the same ratio of processor seconds, for machines that are busy with other things too. Ours
trains on latents that were encoded before, as the encode job does; the script encodes each picture with the VAE at every step.
`--ladder` begins with what the script does at every step (VAE and text encoder, fp32) and switches our optimisations on one
after another (bench/ladder.py), each in a process of its own, in every round; the last is what the other options ask for, and
one that fails is left out: the next has what it adds, too. Its rows have the images/s with a rung and with the one before, and
their ratio. `--size sd14` is Stable Diffusion 1.4's architecture at 512x512 with random weights; in fp32 it needs
`--micro-batch 4` to fit 80 GB (both sides accumulate gradients then). On a GPU the line has both sides' peak memory, as
PyTorch's allocator saw it, beside what momalisa/training/memory.py computes for ours (with CUDA's context), and both sides' MFU.

On a busy machine take `--threads 1`: idle threads that wait for others count as processor seconds. The last line printed is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import sd14
from results import COLUMNS, processor, report

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


class Marks:
    """When each optimizer step ended, by the clock and in processor seconds of this process."""

    def __init__(self, warmup: int, steps: int) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.first, self.last, self.count = warmup, warmup + steps, 0
        self.found: list[tuple[float, float]] = []
        register_optimizer_step_post_hook(self._mark)

    def _mark(self, *_: Any) -> None:
        import torch

        self.count += 1
        if self.count in (self.first, self.last) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.first <= self.count <= self.last:
            self.found.append((time.monotonic(), time.process_time()))

    def step(self) -> dict[str, float]:
        """Seconds of a step, from the last of the warm-up to the end."""
        assert self.count >= self.last, f"{self.count} steps of {self.last}"
        (began, before), (ended, after) = self.found[0], self.found[-1]
        steps = self.last - self.first
        return {"clock_s": (ended - began) / steps, "cpu_s": (after - before) / steps}


def accelerator_memory() -> dict[str, float]:
    """What PyTorch's allocator has held at most, in GiB: by tensors, and of the GPU. Nothing without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    kinds = {"allocated_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {name: value / 2**30 for name, value in kinds.items()}


def computed_gib(options: argparse.Namespace) -> float:
    """What memory.py says of our side."""
    from momalisa.config import Diffusion, Encode, Settings
    from momalisa.training import memory

    encode = Encode(resolution_px=options.resolution)
    settings = Settings(diffusion=Diffusion(model=options.model), encode=encode, train=train_settings(options))
    return memory.estimate(settings).peak


def peer(options: argparse.Namespace, arguments: list[str]) -> None:
    """The script, in a process of its own; the last line says how it went."""
    marks = Marks(options.warmup, options.steps)
    sys.argv = [str(options.script), *arguments]
    runpy.run_path(str(options.script), run_name="__main__")
    print(json.dumps(marks.step() | accelerator_memory()))


def train_settings(options: argparse.Namespace) -> Any:
    from momalisa.config import Train

    return Train(
        images=(options.warmup + options.steps) * options.batch,
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


def works(options: argparse.Namespace, diffusion: Any) -> Any:
    """The training set, encoded; or to be encoded at each use."""
    import ladder
    import torch

    from momalisa.latents import Autoencoder, TextEncoder
    from momalisa.training.cache import LatentCache

    rows = [json.loads(line) for line in (options.data / "metadata.jsonl").read_text().splitlines()]
    autoencoder = Autoencoder.load(diffusion, "cuda" if torch.cuda.is_available() else "cpu")
    texts = [row["text"] for row in rows]
    paths, tokens = [options.data / row["file_name"] for row in rows], TextEncoder.load(diffusion).tokenize(texts)
    pictures = ladder.pictures(paths, texts, tokens, autoencoder)
    if ladder.MOMENTS in options.off:
        return pictures
    groups = [list(range(start, min(start + 8, len(rows)))) for start in range(0, len(rows), 8)]
    moments = [one for group in groups for one in pictures.rows(group).stacked()]
    return LatentCache(pictures.ids, texts, moments, tokens)


def ours(options: argparse.Namespace) -> None:
    """Our side, in a process of its own: encode, then train for so many steps; the last line says how it went."""
    import ladder
    import torch

    from momalisa.config import Diffusion
    from momalisa.storage import Store
    from momalisa.training.loop import Events, Run, Trainer

    ladder.switch_off(options.off)
    torch.set_num_threads(options.threads)
    if options.workers > 1:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    diffusion = Diffusion(model=options.model)
    cache = works(options, diffusion)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # encoding is a job of its own
    marks = Marks(options.warmup, options.steps)
    said: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        train = train_settings(options)
        trainer = Trainer(Run("bench", train, diffusion, cache, Store(scratch)), Events(logged=said.update), options.workers)
        snapshot = trainer.snapshot

        def timed() -> Any:
            began = time.monotonic()
            made = snapshot()
            said["checkpoint_stall_s"] = time.monotonic() - began
            return made

        trainer.snapshot = timed  # type: ignore[method-assign]
        trainer.writer.submit = lambda snapshot: None  # type: ignore[method-assign]  # steps never wait for the disk
        trainer.train()
    print(json.dumps(marks.step() | {key: said[key] for key in FIGURES if key in said} | accelerator_memory()))


FIGURES = ("data_wait_fraction", "peak_memory_gib", "mfu", "checkpoint_stall_s")


def our_command(options: argparse.Namespace) -> list[str]:
    same = [f"--model={options.model}", f"--data={options.data}", f"--batch={options.batch}", f"--threads={options.threads}"]
    same += [f"--resolution={options.resolution}", f"--precision={options.precision}", f"--optimizer={options.optimizer}"]
    same += [f"--warmup={options.warmup}", f"--steps={options.steps}", f"--workers={options.workers}"]
    same += [f"--micro-batch={options.micro_batch}"] if options.micro_batch else []
    same += ["--compile"] if options.compile else []
    same += ["--gradient-checkpointing"] if options.gradient_checkpointing else []
    same += [f"--off={name}" for name in options.off]
    return [sys.executable, str(HERE), "--side=ours", *same]


def peer_command(options: argparse.Namespace, scratch: Path) -> list[str]:
    import torch

    precision = {"fp32": "no"}.get(options.peer_precision, options.peer_precision)
    flags = {
        "pretrained_model_name_or_path": options.model,
        "train_data_dir": options.data.parent,
        "caption_column": "text",
        "resolution": options.resolution,
        "train_batch_size": options.micro_batch or options.batch,
        "gradient_accumulation_steps": options.batch // (options.micro_batch or options.batch),
        "max_train_steps": options.warmup + options.steps,
        "learning_rate": 1e-5,
        "lr_scheduler": "constant",
        "snr_gamma": 5.0,
        "max_grad_norm": 1,
        "checkpointing_steps": 10**9,
        "dataloader_num_workers": 0 if not torch.cuda.is_available() else 8,
        "seed": 0,
        "mixed_precision": precision,
        "output_dir": scratch / "peer",
        "cache_dir": scratch / "cache",
    }
    listed = [f"--{key}={value}" for key, value in flags.items()]
    listed += ["--gradient_checkpointing"] if options.gradient_checkpointing else []
    how = ["--side=peer", f"--script={options.script}", f"--warmup={options.warmup}", f"--steps={options.steps}", "--"]
    return [sys.executable, str(HERE), *how, *listed, "--use_ema", "--foreach_ema"]


class Failed(Exception):
    """A side's process; the message has the end of what it said."""


def program(side: str, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Run one side: seconds of a step by the clock and of processors, and what else our side says."""
    line = our_command(options) if side == "ours" else peer_command(options, scratch)
    workers = options.workers if side == "ours" else 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(workers)}
    environment = {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    processes = []
    for rank in range(workers):
        own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if workers > 1 else {}
        with (scratch / f"{side}-{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(line, env=environment | own, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in processes]
    printed = [(scratch / f"{side}-{rank}.log").read_text() for rank in range(workers)]
    if any(codes):
        raise Failed(f"{side} failed:\n" + "\n".join(text[-3000:] for text in printed))
    found: dict[str, float] = json.loads(printed[0].strip().splitlines()[-1])
    return found


def prepare(options: argparse.Namespace, scratch: Path) -> None:
    options.data = scratch / "pictures" / "train"
    make_pictures(options.data, options.resolution)
    if options.size == "sd14":
        options.model = str(scratch / "sd14")
        sd14.save(Path(options.model))


Rounds = dict[str, list[dict[str, float]]]
RUNG = "ours: "  # begins the name of a side that is a rung of the ladder


def rounds(options: argparse.Namespace, sides: dict[str, argparse.Namespace], scratch: Path) -> Rounds:
    """Every side once a round, its name beginning with `ours` or `peer`. A rung that fails (memory may be too small for fp32)
    is said and left out; without the others there is nothing to compare."""
    found: Rounds = {name: [] for name in sides}
    for turn in range(options.rounds):
        for name in list(found):
            try:
                told = program("peer" if name == "peer" else "ours", sides[name], scratch)
            except Failed as failed:
                if not name.startswith(RUNG):
                    raise SystemExit(str(failed)) from None
                print(f"round {turn + 1}: {name}: left out: {failed}", file=sys.stderr, flush=True)
                del found[name]
                continue
            found[name].append(told)
            said = {key: round(value, 4) for key, value in told.items()}
            print(f"round {turn + 1}: {name}: {options.batch / told['clock_s']:.1f} images/s {said}", file=sys.stderr, flush=True)
    return found


def ratio(found: Rounds, ours: str, peer: str, figure: str) -> float:
    """How many times faster, the median over the rounds."""
    return round(median(b[figure] / a[figure] for a, b in zip(found[ours], found[peer], strict=True)), 2)


def rate(options: argparse.Namespace, told: list[dict[str, float]]) -> float:
    return round(options.batch / median(one["clock_s"] for one in told), 1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Our side beside the script; with --ladder, also with each optimisation added to those before it."""
    import ladder

    rungs = ladder.climb(options)[:-1] if options.ladder else []
    sides = {"peer": options, "ours": options, **{RUNG + said: chosen for said, chosen in rungs}}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))
        for one in sides.values():
            one.data, one.model = options.data, options.model
        found = rounds(options, sides, Path(folder))
    how = f"{options.precision}{', compiled' if options.compile else ''}"
    what = "miniature UNet" if options.size == "miniature" else "UNet of Stable Diffusion 1.4 with random weights"
    last = found["ours"][-1]
    return {
        "claim": f"training, {what}, {options.resolution}x{options.resolution}, batch {options.batch}, images/s; "
        f"ours {how} against train_text_to_image.py {options.peer_precision}",
        "ours": rate(options, found["ours"]),
        "peer": rate(options, found["peer"]),
        "ratio": ratio(found, "ours", "peer", "clock_s"),
        "cpu_ratio": ratio(found, "ours", "peer", "cpu_s"),
        "hardware": hardware(options),
        **{key: round(last[key], 4) for key in FIGURES if key in last},
        **on_accelerator(options, found),
        **({"ladder": gains(options, found)} if options.ladder else {}),
    }


def hardware(options: argparse.Namespace) -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{options.threads} threads of {os.cpu_count()} x {processor()}"


def gains(options: argparse.Namespace, found: Rounds) -> list[dict[str, Any]]:
    """Each rung of the ladder, by its number, beside the last below it that was not left out, and what is new since that one;
    the first beside the script."""
    import ladder

    *below, (top, _) = ladder.climb(options)
    made: list[dict[str, Any]] = []
    before, added = "peer", list[str]()
    for number, (said, name) in enumerate([*((said, RUNG + said) for said, _ in below), (top, "ours")]):
        added = [*added, said] if number > 1 else [said]  # rung 0 adds nothing
        if name not in found:
            continue
        rung = {
            "number": number,
            "rung": " ".join(added),
            "images_per_s": rate(options, found[name]),
            "before": rate(options, found[before]),
            "gain": ratio(found, name, before, "clock_s"),
            "cpu_gain": ratio(found, name, before, "cpu_s"),
            "ratio": ratio(found, name, "peer", "clock_s"),
            "mfu": found[name][-1].get("mfu"),
        }
        made.append(rung)
        before, added = name, []
    return made


def table(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of RESULTS.md: the claim, then the ladder's rungs, each against the one before it."""
    what, _, against = figures["claim"].partition("; ")
    made = [{name: figures[name] for name in COLUMNS}]
    for rung in figures.get("ladder", []):
        peer = "the rung before" if len(made) > 1 else against.rpartition(" against ")[2]
        claim = f"{what}; ladder {rung['number']}: {rung['rung']}, against {peer}"
        made.append({**made[0], "claim": claim, "ours": rung["images_per_s"], "peer": rung["before"], "ratio": rung["gain"]})
    return made


def on_accelerator(options: argparse.Namespace, found: Rounds) -> dict[str, Any]:
    """Peak memory of both sides beside the computed one, and the script's MFU: the same products at its own rate."""
    ours, theirs = found["ours"][-1], found["peer"][-1]
    if "allocated_gib" not in ours:
        return {}
    memory = {
        side: {key: round(told[key], 2) for key in told if key.endswith("ed_gib")}
        for side, told in (("ours", ours), ("peer", theirs))
    }
    mfu = {"peer_mfu": round(ours["mfu"] / ratio(found, "ours", "peer", "clock_s"), 4)} if "mfu" in ours else {}
    return {"memory": {**memory, "computed_gib": round(computed_gib(options), 2)}, **mfu}


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Two workers with half the threads each against one with half the threads, the same global batch."""
    options.threads = max(1, options.threads // 2)
    one, two = argparse.Namespace(**vars(options)), argparse.Namespace(**{**vars(options), "workers": 2})
    sides = {"ours alone": one, "ours twice": two}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))
        for side in sides.values():
            side.data, side.model = options.data, options.model
        found = rounds(options, sides, Path(folder))
    times = ratio(found, "ours twice", "ours alone", "clock_s")
    return {
        "claim": f"training, 2 workers against 1, {options.threads} threads each, batch {options.batch}: images/s; 2 is perfect",
        "ours": rate(options, found["ours twice"]),
        "peer": rate(options, found["ours alone"]),
        "ratio": times,
        "efficiency": round(times / 2, 2),
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
    parser.add_argument("--warmup", type=int, default=5, help="first steps, not counted")
    parser.add_argument("--steps", type=int, default=20, help="steps that are counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append a row to bench/RESULTS.md")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--off", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.resolution = options.resolution or (512 if options.size == "sd14" else 128)
    if options.side:
        ours(options) if options.side == "ours" else peer(options, options.arguments)
        return
    if not options.scaling and (options.script is None or not options.script.is_file()):
        parser.error(f"--script {options.script}: give the path of train_text_to_image.py in a checkout of diffusers")
    figures = scaling(options) if options.scaling else measure(options)
    report(figures, options.record, table(figures))


if __name__ == "__main__":
    main()
