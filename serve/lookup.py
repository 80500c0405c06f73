"""Which adapters there are, and whether one is, asked before a task is admitted: neither engine nor event loop wait for a store.

A store that does not answer costs its own few threads: whoever asks for an adapter that is not known yet is told so soon.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from momalisa.checkpoint import Checkpoint
from momalisa.config import Diffusion
from momalisa.engine import Catalogue, NoAdapter
from momalisa.storage import Store
from serve.errors import listed
from serve.task import STORE_WITHIN_S, Failed, Unavailable

logger = logging.getLogger(__name__)

THREADS = 4
PATIENCE_S = 5.0  # of the store with its bucket
LISTED_S = 30.0  # how long a list of all adapters is told again


class Lookup:
    """Of the adapters below `root`. Ask from event loops; `clock` in seconds."""

    def __init__(self, root: str, clock: Callable[[], float] = time.monotonic) -> None:
        store = Store(root)
        store.patience_s = PATIENCE_S
        self.catalogue = Catalogue(store)
        self._threads, self._clock = ThreadPoolExecutor(THREADS, thread_name_prefix="lookup"), clock
        self._listing: Future[dict[str, Checkpoint]] | None = None
        self._listed_at = 0.0

    async def adapters(self, base: Diffusion) -> list[str]:
        """The names of those for a base, as they were at most `LISTED_S` ago. Raises Unavailable."""
        try:
            found = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._newest_listing())), STORE_WITHIN_S)
        except Exception as error:  # whatever a store may raise
            logger.error("adapters could not be listed: %s: %s", type(error).__name__, error)
            raise Unavailable("the adapters cannot be listed at present; try again") from None
        return [name for name, one in found.items() if one.diffusion == base]

    async def refusal(self, name: str | None, base: Diffusion) -> Failed | None:
        """What to tell who cannot have that adapter; None: it is known. What went wrong in the store is for the log alone."""
        if name is None or name in self.catalogue:
            return None
        try:
            finding = asyncio.get_running_loop().run_in_executor(self._threads, self.catalogue.find, name)
            await asyncio.wait_for(finding, STORE_WITHIN_S)
        except NoAdapter as error:
            logger.info("%s", error)
            return Failed(f"there is no adapter {name}{await self._others(base)}", missing=True)
        except Exception as error:  # whatever a store may raise
            logger.error("adapter %s could not be looked up: %s: %s", name, type(error).__name__, error)
            return Failed(f"the adapter {name} cannot be looked up at present; try again", retry=True)
        return None

    async def _others(self, base: Diffusion) -> str:
        try:
            return f"; {listed(await self.adapters(base))}"
        except Unavailable:
            return ""

    def _newest_listing(self) -> Future[dict[str, Checkpoint]]:
        """The one that is under way, or that is young and did not fail; else a new one."""
        now, newest = self._clock(), self._listing
        if newest is None or (newest.done() and (now - self._listed_at > LISTED_S or newest.exception() is not None)):
            newest = self._threads.submit(self.catalogue.adapters)
            self._listing, self._listed_at = newest, now
        return newest

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
