"""dataset: look at a collection's versions, edit its captions, take it elsewhere.

    python -m momalisa.dataset log --config configs/demo.yaml
    python -m momalisa.dataset show [VERSION]            counts, rejects by reason, sizes
    python -m momalisa.dataset diff OLD NEW [--json]     works and captions added, removed, changed
    python -m momalisa.dataset checkout VERSION          make a published version the latest again
    python -m momalisa.dataset manifest --to data/manifest.json     what DVC tracks
    python -m momalisa.dataset gc [--dry-run]            delete files that no published version names
    python -m momalisa.dataset export imagefolder DIR
    python -m momalisa.dataset card DIR                  the collection at a glance, as HTML
    python -m momalisa.dataset captions export FILE.csv  (and `captions import FILE.csv`)

VERSION is `latest` or the beginning of a hash that `log` shows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from momalisa.config import Settings
    from momalisa.dataset import Dataset, Version


def log(settings: Settings, options: argparse.Namespace) -> None:
    from momalisa.dataset.inventory import history, log_text

    lines = history(_dataset(settings), options.limit)
    print(json.dumps(lines, indent=1) if options.json else log_text(lines) or "nothing was published yet")


def show(settings: Settings, options: argparse.Namespace) -> None:
    from momalisa.dataset.inventory import inventory, show_text

    dataset = _dataset(settings)
    found = inventory(dataset, dataset.read(dataset.resolve(options.version)))
    print(json.dumps(found, indent=1, ensure_ascii=False) if options.json else show_text(found))


def diff(settings: Settings, options: argparse.Namespace) -> None:
    from momalisa.dataset.difference import as_json, as_text, difference

    dataset = _dataset(settings)
    old, new = (dataset.read(dataset.resolve(name)) for name in (options.old, options.new))
    found = difference(dataset, old, new)
    print(json.dumps(as_json(found), indent=1, ensure_ascii=False) if options.json else as_text(found, options.limit))


def checkout(settings: Settings, options: argparse.Namespace) -> None:
    from momalisa.dataset import checkout as checking

    dataset = _dataset(settings)
    if (options.version is None) == (options.manifest is None):
        raise ValueError("name either a version or a file: --manifest data/manifest.json")
    version = checking.read_manifest(options.manifest) if options.manifest else dataset.read(dataset.resolve(options.version))
    copied = checking.checkout(dataset, version, options.origin)
    print(f"latest is {version.sha256[:12]}: {len(version.paths())} tables, {copied} of them copied here")


def manifest(settings: Settings, options: argparse.Namespace) -> None:
    from momalisa.storage import canonical_json

    dataset = _dataset(settings)
    version = dataset.read(dataset.resolve(options.version))
    Path(options.to).parent.mkdir(parents=True, exist_ok=True)
    Path(options.to).write_bytes(canonical_json(version.as_json()))
    print(f"{options.to} describes version {version.sha256[:12]}")


def gc(settings: Settings, options: argparse.Namespace) -> None:
    from momalisa.dataset.garbage import garbage, sweep
    from momalisa.dataset.inventory import megabytes

    dataset = _dataset(settings)
    files = garbage(dataset, options.grace_hours, options.delete_version)
    for path, file in sorted(files.items()):
        print(f"{path}  {megabytes(file.size)}")
    if not options.dry_run:
        sweep(dataset, files)
    said = "would be deleted" if options.dry_run else "deleted"
    print(f"{len(files)} files, {megabytes(sum(file.size for file in files.values()))} {said}")


def export(settings: Settings, options: argparse.Namespace) -> None:
    from momalisa.dataset import imagefolder

    dataset, version, captioner = _chosen(settings, options)
    texts = dataset.texts(version, captioner, settings.encode.caption) if captioner else {}
    count = imagefolder.export(dataset, version, texts, Path(options.directory))
    print(
        f"{options.directory}: {count} pictures; datasets.load_dataset('imagefolder', data_dir={options.directory!r}) reads them"
    )


def card(settings: Settings, options: argparse.Namespace) -> None:
    from momalisa.dataset import card as cards
    from momalisa.storage import Store

    dataset, version, captioner = _chosen(settings, options)
    cards.write(dataset, version, settings.name, captioner, Store(options.directory), settings.encode.caption)
    print(f"{options.directory}/index.html describes version {version.sha256[:12]}")


def captions(settings: Settings, options: argparse.Namespace) -> None:
    from momalisa.dataset import edits

    path = Path(options.file)
    if options.direction == "import":
        written, withdrawn = edits.import_csv(_dataset(settings), path)
        print(f"{written} captions edited, {withdrawn} edits withdrawn; the encode job takes them up")
        return
    dataset, version, captioner = _chosen(settings, options)
    data = edits.export_csv(dataset, version, captioner or "", settings.encode.caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(f"{path}: change the column `caption`, save as CSV UTF-8, then `captions import {path}`")


def _dataset(settings: Settings) -> Dataset:
    from momalisa.dataset import Dataset

    return Dataset(settings.dataset)


def _chosen(settings: Settings, options: argparse.Namespace) -> tuple[Dataset, Version, str | None]:
    """(dataset, version, captioner id): the one that was named, the only one, or that of the settings; None without any."""
    dataset = _dataset(settings)
    version = dataset.read(dataset.resolve(options.version))
    known = sorted(version.captions)
    if options.captioner is not None or len(known) > 1:
        name = options.captioner or _configured(settings)
        known = [captioner for captioner in known if captioner.startswith(name)]
        if len(known) != 1:
            raise ValueError(
                f"{name} is not one captioner of this version; --captioner can be {', '.join(sorted(version.captions))}"
            )
    return dataset, version, known[0] if known else None


def _configured(settings: Settings) -> str:
    from momalisa.captioner import captioner_id

    return captioner_id(settings)


def parser() -> argparse.ArgumentParser:
    """The command line; its help imports nothing heavy."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", required=True, metavar="YAML", help="the settings, for example configs/demo.yaml")
    whole = argparse.ArgumentParser(
        prog="python -m momalisa.dataset",
        description=__doc__,
        epilog="Any setting can follow: --root=gs://bucket/prefix",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Any, said: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, parents=[shared], help=said, description=said, allow_abbrev=False)
        added.set_defaults(run=run, name=run.__name__)
        return added

    def versioned(added: argparse.ArgumentParser) -> None:
        added.add_argument("--version", default="latest", help="latest, or the beginning of a hash (default: latest)")
        added.add_argument("--captioner", metavar="ID", help="whose captions, where there are several captioners")

    added = command(log, "publications, newest first, with their rows by family")
    added.add_argument("--limit", type=int, default=20, help="so many (default: 20)")
    added.add_argument("--json", action="store_true")
    added = command(show, "what a version holds: rows, rejects by reason, sizes")
    added.add_argument("version", nargs="?", default="latest")
    added.add_argument("--json", action="store_true")
    added = command(diff, "works and captions that were added, removed or changed between two versions")
    added.add_argument("old")
    added.add_argument("new")
    added.add_argument("--json", action="store_true")
    added.add_argument("--limit", type=int, default=20, help="lines of each kind (default: 20; --json has all)")
    added = command(checkout, "make a version the latest, after checking that its tables are there")
    added.add_argument("version", nargs="?")
    added.add_argument("--manifest", metavar="FILE", help="a manifest that DVC brought, in place of a version")
    added.add_argument("--from", dest="origin", metavar="ROOT", help="another dataset's root: tables missing here are copied")
    added = command(manifest, "write a version's manifest to a file for DVC to track")
    added.add_argument("version", nargs="?", default="latest")
    added.add_argument("--to", metavar="FILE", default="data/manifest.json")
    added = command(gc, "delete files that no published version names")
    added.add_argument("--dry-run", action="store_true", help="only say which")
    added.add_argument("--grace-hours", type=float, default=24.0, help="younger files stay: a job may be running (default: 24)")
    added.add_argument("--delete-version", action="append", default=[], metavar="VERSION", help="and this version's; repeatable")
    added = command(export, "write pictures and texts as a folder that `datasets` reads")
    added.add_argument("format", choices=["imagefolder"])
    added.add_argument("directory", metavar="DIR")
    versioned(added)
    added = command(card, "write the dataset card: DIR/index.html and DIR/contact.png")
    added.add_argument("directory", metavar="DIR")
    versioned(added)
    added = command(captions, "captions to a spreadsheet, and a curator's edits back")
    added.add_argument("direction", choices=["export", "import"])
    added.add_argument("file", metavar="FILE.csv")
    versioned(added)
    return whole


def main(arguments: list[str] | None = None) -> None:
    options, overrides = parser().parse_known_args(arguments)
    from momalisa.config import ConfigError, from_file

    try:
        settings = from_file(options.config, overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    try:
        options.run(settings, options)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("MOMALISA_TRACEBACK"):
            raise
        sys.exit(f"dataset {options.name}: {error}")


if __name__ == "__main__":
    main()
