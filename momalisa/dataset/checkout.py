"""Move `refs/latest` to a version that was published before, or that a manifest file describes."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from momalisa.dataset import Dataset, Version
from momalisa.storage import READERS

TABLE = re.compile(r"(images|duplicates|edits|(captions|latents)/[\w.-]+)/[0-9a-f]{32}\.parquet")


def read_manifest(path: str) -> Version:
    """A version from a file that DVC brought. Raises ValueError where it is none."""
    try:
        version = Version.from_json(json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise ValueError(f"--manifest {path}: {error.strerror or error}; `dvc pull` brings it") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of a dataset: {type(error).__name__}: {error}") from error
    for name in sorted(version.paths()):
        if not TABLE.fullmatch(name):
            raise ValueError(f"{path} names {name!r}, which is no table's path (<family>/<32 hex digits>.parquet)")
    return version


def checkout(dataset: Dataset, version: Version, origin: str | None = None) -> int:
    """Publish the version again; tables that are missing here are copied from the dataset at `origin`; returns how many.

    Raises ValueError, and moves nothing, where tables are missing.
    """
    missing = dataset.store.missing(version.paths())
    if missing and origin is None:
        raise ValueError(
            f"{dataset.store.root}: {len(missing)} of {len(version.paths())} tables of version {version.sha256[:12]} are "
            f"missing, for example {missing[0]}; name a dataset that holds them: --from gs://bucket/prefix/dataset"
        )
    if origin is not None:
        fetch(dataset, missing, Dataset(origin))
    dataset.publish(version)
    return len(missing)


def fetch(dataset: Dataset, paths: list[str], origin: Dataset) -> None:
    """Copy tables, checking that each is what its name says."""
    if absent := origin.store.missing(paths):
        raise ValueError(f"{origin.store.root} lacks {len(absent)} of these tables too, for example {absent[0]}")

    def copy(path: str) -> None:
        data = origin.store.read_bytes(path)
        if hashlib.sha256(data).hexdigest()[:32] != Path(path).stem:
            raise ValueError(f"{origin.store.url(path)} is not what its name says: it was changed")
        dataset.store.write_bytes(path, data)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(copy, paths))
