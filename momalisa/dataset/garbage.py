"""Files that no published version names: what killed jobs left, and what versions named that were deleted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from momalisa.dataset import Dataset
from momalisa.storage import READERS, File

FOLDERS = ("images", "duplicates", "captions", "edits", "latents", "corrections", "manifests", "drafts", "refs")
GRACE_HOURS = 24.0


def garbage(dataset: Dataset, grace_hours: float = GRACE_HOURS, delete: Sequence[str] = ()) -> dict[str, File]:
    """Files that may go: named by no published version but those to `delete`, and older than the grace.

    The grace is for running jobs: their tables are named only when they are done. What a draft names that was added to
    within the grace stays too, whatever its age: a job may run for days. The manifests to delete go whatever
    their age. Raises ValueError for a name that is no published version, and for the latest.
    """
    doomed = chosen(dataset, delete)
    youngest = time.time() - grace_hours * 3600
    files = {path: file for folder in FOLDERS for path, file in dataset.store.files(folder).items()}
    kept = named(dataset, doomed) | drafted(dataset, files, youngest)
    manifests = {f"manifests/{digest}.json" for digest in doomed}
    return {
        path: file
        for path, file in files.items()
        if path in manifests or (path not in kept and not _pointer(path) and file.modified < youngest)
    }


def chosen(dataset: Dataset, names: Iterable[str]) -> set[str]:
    """Versions by (the beginnings of) their hashes; the latest is refused."""
    digests = {dataset.resolve(name) for name in names}
    if digests & {latest := dataset.latest().sha256}:
        raise ValueError(f"{latest[:12]} is the latest version and cannot be deleted; check out another one first")
    return digests


def named(dataset: Dataset, doomed: set[str]) -> set[str]:
    """Every table and manifest of the published versions but the doomed ones."""
    digests = [digest for digest in dataset.published() if digest not in doomed]
    tables = {path for digest in digests for path in dataset.read(digest).paths()}
    return tables | {f"manifests/{digest}.json" for digest in digests}


def drafted(dataset: Dataset, files: dict[str, File], youngest: float) -> set[str]:
    """The drafts of jobs that were at work since `youngest`, and the tables that they name."""
    drafts: dict[str, list[str]] = {}
    for path in files:
        if path.startswith("drafts/"):
            drafts.setdefault(path.rsplit("/", 1)[0], []).append(path)
    alive = [path for paths in drafts.values() if any(files[path].modified >= youngest for path in paths) for path in paths]
    with ThreadPoolExecutor(READERS) as pool:
        entries = pool.map(dataset.store.read_json, alive)
        return {*alive, *(str(entry.get(name, "")) for entry in entries for name in ("table", "told"))}


def _pointer(path: str) -> bool:
    return path.startswith("refs/") and not path.endswith(".partial")


def sweep(dataset: Dataset, files: Iterable[str]) -> None:
    """Delete: manifests first, so that no version is ever published without its tables.

    What a version names that was published meanwhile stays.
    """
    manifests = [path for path in files if path.startswith("manifests/")]
    for path in manifests:
        dataset.store.delete(path)
    kept = named(dataset, set())
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(dataset.store.delete, [path for path in files if path not in kept and path not in manifests]))
