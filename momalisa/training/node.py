"""What the processes of a node share on its disk: the first that needs it fetches it, the others wait and map the same pages.

Whoever uses a file or a folder holds a shared lock on it, which the kernel frees when its holder dies; what nobody holds may go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from momalisa.storage import FULL


def folder(chosen: str | None) -> Path:
    """`train.cache_dir`, or this user's own in the system's temporary folder."""
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"momalisa-{os.getuid()}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Inside, no other process of this node is."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextlib.contextmanager
def shared(place: Path, name: str, fetch: Callable[[Path], object]) -> Iterator[Path]:
    """The folder `<place>/<name>`, which the first process fills with `fetch` and the last one that leaves removes.

    Raises what `fetch` does, and OSError where the disk is full; a folder that is not whole is never seen.
    """
    place.mkdir(parents=True, exist_ok=True)
    whole = place / name
    with locked(place / "lock"):
        if not whole.exists():
            _sweep(place)
            _make(whole, fetch)
        held = os.open(whole, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_SH)
    try:
        yield whole
    finally:
        os.close(held)
        with locked(place / "lock"):
            _sweep(place)


def _make(whole: Path, fetch: Callable[[Path], object]) -> None:
    partial = whole.with_name(f"{whole.name}.partial")
    try:
        partial.mkdir()
        fetch(partial)
        partial.rename(whole)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            f"a checkpoint's state could not be kept in {whole.parent} ({error}); free space or set train.cache_dir"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove what no living process holds. Called with the lock."""
    for path in filter(Path.is_dir, place.iterdir()):
        found = os.open(path, os.O_RDONLY)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        os.close(found)
