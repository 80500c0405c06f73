"""Look at checkpoints, check them, and take them away.

    python -m momalisa.checkpoint list --root out/demo [RUN]
    python -m momalisa.checkpoint verify RUN@IMAGES --root out/demo
    python -m momalisa.checkpoint export RUN@IMAGES FOLDER --root out/demo [--fuse]
    python -m momalisa.checkpoint average RUN@IMAGES 0.12 --root out/demo

`export` writes a folder that `StableDiffusionPipeline.from_pretrained(FOLDER)` loads; a LoRA's is for `load_lora_weights`,
or with --fuse a whole pipeline too. `average` makes a checkpoint whose weights are a power-function average of this length, of
a run that kept some (train.power_ema). `best` stands for the promoted checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m momalisa.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="every whole checkpoint")
    listing.add_argument("run", nargs="?", default="")
    checking = commands.add_parser("verify", help="compare every file with its hash")
    exporting = commands.add_parser("export", help="a folder for plain diffusers")
    averaging = commands.add_parser("average", help="a checkpoint of another average")
    for command in (checking, exporting, averaging):
        command.add_argument("checkpoint", metavar="RUN@IMAGES", help="or `best`")
    exporting.add_argument("folder", type=Path)
    exporting.add_argument("--fuse", action="store_true", help="put a LoRA's adapters into the UNet")
    averaging.add_argument("sigma_rel", type=float, help="its length, as a share of the run")
    for command in (listing, checking, exporting, averaging):
        command.add_argument("--root", required=True, help="the settings' root: a folder or gs://bucket/prefix")
    options = parser.parse_args(arguments)
    try:
        print(run(options))
    except ValueError as error:
        sys.exit(str(error))


def run(options: argparse.Namespace) -> str:
    """What a command says. Raises ValueError for people."""
    from momalisa import checkpoint as checkpoints
    from momalisa.checkpoint.export import export
    from momalisa.storage import Store

    store = Store(options.root)
    if options.command == "list":
        runs = [options.run] if options.run else sorted({path.split("/")[1] for path in store.list("checkpoints")})
        return "\n".join(found.name for run in runs for found in checkpoints.read_all(store, run)) or "no checkpoint"
    chosen = checkpoints.read_best(store) if options.checkpoint == "best" else checkpoints.find(store, options.checkpoint)
    if options.command == "verify":
        checkpoints.verify(store, chosen)
        return f"{chosen.name} is whole: {len(chosen.files)} files"
    if options.command == "average":
        from momalisa.training.posthoc import make

        return f"{make(store, chosen, options.sigma_rel).name} is written"
    return f"{chosen.name} is in {export(store, chosen, options.folder, options.fuse)}"


if __name__ == "__main__":
    main()
