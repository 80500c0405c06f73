"""Power-function averages of the trained weights as training leaves them, kept with checkpoints and longer than these.

    <root>/checkpoints/<run>/<images seen>/averages/<sigma_rel>.safetensors   fp32, by the parameters' names
    <root>/checkpoints/<run>/<images seen>/averages/hashes.json               written last

Averages of other lengths are made of them (`momalisa.training.posthoc`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from momalisa.config.training import LONGEST_EMA
from momalisa.storage import StorageError, Store

AVERAGES = "averages"
HASHES = "hashes.json"
ENDING = ".safetensors"

_hashes = TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class Snapshot:
    """The averages of one moment."""

    path: str  # relative to the store's root
    images_seen: int
    hashes: dict[str, str]  # file name -> sha256

    @property
    def lengths(self) -> list[float]:
        return [float(name.removesuffix(ENDING)) for name in self.hashes]


def write(store: Store, checkpoint: str, values: dict[float, dict[str, torch.Tensor]]) -> None:
    """Write the averages of the checkpoint at a path: by length, then by parameter."""
    folder = f"{checkpoint}/{AVERAGES}"
    with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
        for sigma_rel, average in values.items():
            save_file(average, Path(scratch) / f"{sigma_rel}{ENDING}")
        hashes = store.upload(Path(scratch), folder)
    store.write_json(f"{folder}/{HASHES}", hashes)


def read_all(store: Store, run: str) -> list[Snapshot]:
    """Every complete snapshot of a run, in order of images seen. One that is damaged is passed over and said."""
    found = []
    for path in store.list(f"checkpoints/{run}"):
        if path.endswith(f"/{AVERAGES}/{HASHES}"):
            try:
                found.append(_read(store, path.removesuffix(f"/{HASHES}")))
            except FileNotFoundError:  # `retain` was here meanwhile
                continue
            except StorageError:
                raise
            except (ValueError, RecursionError) as error:
                said = str(error).splitlines()[0]
                print(f"averages: {store.url(path)} is damaged ({said}); passed over", flush=True)
    return sorted(found, key=lambda snapshot: snapshot.images_seen)


def _read(store: Store, folder: str) -> Snapshot:
    """Raises FileNotFoundError, and ValueError where the hashes are not such."""
    hashes = _hashes.validate_python(store.read_json(f"{folder}/{HASHES}"))
    snapshot = Snapshot(folder, int(folder.split("/")[-2]), hashes)
    for name, length in zip(hashes, snapshot.lengths, strict=True):
        if name != f"{length}{ENDING}" or not 0 < length <= LONGEST_EMA:
            raise ValueError(f"it names {name!r}")
    return snapshot


def load(store: Store, snapshot: Snapshot, sigma_rel: float) -> dict[str, torch.Tensor]:
    """One average by parameter. Raises ValueError where its file is not what was written."""
    name = f"{sigma_rel}{ENDING}"
    with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
        folder = store.download(snapshot.path, {name: snapshot.hashes[name]}, Path(scratch))
        return load_file(folder / name)


def retain(store: Store, run: str, keep: int) -> None:
    """Keep so many snapshots, spread over the run. The hashes go first: from then on a snapshot does not exist."""
    found = read_all(store, run)
    kept = spread([snapshot.images_seen for snapshot in found], keep)
    for snapshot in found:
        if snapshot.images_seen not in kept:
            for name in (HASHES, *snapshot.hashes):
                store.delete(f"{snapshot.path}/{name}")


def spread(times: Sequence[int], keep: int) -> list[int]:
    """At most `keep` of some ascending times, the newest among them: those between the nearest neighbours go first."""
    kept = list(times)
    while len(kept) > max(keep, 1):
        gaps = [after - before for before, after in zip([0, *kept], kept[1:], strict=False)]
        kept.pop(gaps.index(min(gaps)))
    return kept
