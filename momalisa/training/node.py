"""What the processes of a node share on its disk: the first that needs it fetches it, the others wait and map the same pages.

Whoever uses a file or a folder holds a shared lock on it, which the kernel frees when its holder dies; what nobody holds may go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from momalisa.storage import FULL

MADE = re.compile(r"[0-9a-f]{24}(\.partial)?")  # names of folders that `shared` makes


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

    `name` is 24 hexadecimal digits: folders of other names in `place` are the user's own. Raises what `fetch` does, and OSError
    where the disk is full; a folder that is not whole is never seen.
    """
    place.mkdir(parents=True, exist_ok=True)
    whole, partial = place / name, place / f"{name}.partial"
    with contextlib.ExitStack() as stack:
        try:
            with locked(place / "entering"):  # for as long as a download takes; who leaves needs the other lock only
                if stack.enter_context(_held(whole, partial)) == partial:
                    fetch(partial)
                    partial.rename(whole)  # and is held as before
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(
                f"a checkpoint's state could not be kept in {place} ({error}); free space or set train.cache_dir"
            ) from error
        yield whole


@contextlib.contextmanager
def _held(whole: Path, partial: Path) -> Iterator[Path]:
    """Hold the whole folder where another process does, or else a new one to be filled."""
    with locked(whole.parent / "lock"):
        _sweep(whole.parent)
        found = whole if whole.exists() else partial
        if found == partial:
            partial.mkdir()
        held = os.open(found, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_SH)
    try:
        yield found
    finally:
        os.close(held)
        with locked(whole.parent / "lock"):
            _sweep(whole.parent)


def _sweep(place: Path) -> None:
    """Remove what no living process holds, of the folders that are made here. Called with the lock."""
    for path in place.iterdir():
        if not MADE.fullmatch(path.name):
            continue
        found = os.open(path, os.O_RDONLY)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        os.close(found)
