"""Which LoRA adapters a store holds, by name: each manifest is read once, and a name that is none is remembered for a while.

Reading is apart from the engine, whose thread must not wait for a bucket: `find` in any thread first, `known` in the engine's.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from momalisa import checkpoint
from momalisa.checkpoint import Checkpoint, NoCheckpoint
from momalisa.storage import Store, side_by_side

NAME = re.compile(r"[\w-][\w.-]*/\d+")
FOLDER, MANIFEST = "checkpoints/", "/manifest.json"  # around a name
MISS_S = 30.0  # how long a name that is no adapter is not looked for again
MAX_MISSES = 1_000


class NoAdapter(ValueError):
    """A name that is no adapter here."""


class Catalogue:
    """Adapters are named `<run>/<images seen>`, as their checkpoints are, with leading zeros or without.

    For any number of threads; `clock` in seconds.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self._clock = store, clock
        self._found: dict[str, Checkpoint] = {}
        self._whole: set[str] = set()  # names of whole models
        self._misses: OrderedDict[str, tuple[float, str]] = OrderedDict()  # name -> until when, why; the oldest first
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def known(self, name: str) -> Checkpoint:
        """The manifest of an adapter that was found; nothing is read. Raises NoAdapter."""
        if name not in self._found:
            raise NoAdapter(f"adapter={name!r} has not been looked up: Catalogue.find does that, in a thread that may wait")
        return self._found[name]

    def find(self, name: str) -> Checkpoint:
        """An adapter's manifest: a small file, the first time. Raises NoAdapter, or StorageError where the store fails."""
        if name in self._found:
            return self._found[name]
        with self._lock:
            until, why = self._misses.get(name, (0.0, ""))
        if why and self._clock() < until:
            raise NoAdapter(why)
        try:
            found = self._read(name)
        except NoAdapter as error:
            self._remember(name, str(error))
            raise
        self._found[name] = found
        return found

    def adapters(self) -> dict[str, Checkpoint]:
        """Those that the store holds now, by name: a listing, and each new manifest once. Raises StorageError as `find` does."""
        paths = [path.removesuffix(MANIFEST) for path in self.store.list("checkpoints") if path.endswith(MANIFEST)]
        parts = (path.removeprefix(FOLDER).rpartition("/") for path in paths)
        names = dict.fromkeys(f"{run}/{int(images)}" for run, _, images in parts if images.isdecimal())
        wanted = [name for name in names if name not in self._whole]
        found = zip(wanted, side_by_side(self._found_or_none, wanted), strict=True)
        return {name: one for name, one in found if one is not None}

    def _found_or_none(self, name: str) -> Checkpoint | None:
        with suppress(NoAdapter):
            return self.find(name)
        return None

    def _read(self, name: str) -> Checkpoint:
        if not NAME.fullmatch(name):
            raise NoAdapter(f"adapter={name!r} is not of the form run/images, such as impressionists/6400")
        run, _, images = name.rpartition("/")
        try:
            found = checkpoint.read(self.store, f"{FOLDER}{run}/{int(images):09d}")  # as training names folders
        except NoCheckpoint:
            found = self._read_as_named(name)
        if not found.lora:
            self._whole.add(name)
            raise NoAdapter(f"adapter={name!r} is a whole model, not a LoRA: promote it instead")
        return found

    def _read_as_named(self, name: str) -> Checkpoint:
        try:
            return checkpoint.read(self.store, f"{FOLDER}{name}")
        except NoCheckpoint as error:
            raise NoAdapter(f"adapter={name!r}: {error}") from error

    def _remember(self, name: str, why: str) -> None:
        with self._lock:
            self._misses.pop(name, None)
            self._misses[name] = (self._clock() + MISS_S, why)
            while len(self._misses) > MAX_MISSES:
                self._misses.popitem(last=False)
