"""Whether there is an adapter of that name, asked before a task is admitted: neither engine nor event loop wait for a store.

A store that does not answer costs its own few threads: whoever asks for an adapter that is not known yet is told so soon.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from momalisa.engine import Catalogue, NoAdapter
from momalisa.storage import Store
from serve.task import Failed

logger = logging.getLogger(__name__)

THREADS = 4
PATIENCE_S = 5.0  # of the store with its bucket
WITHIN_S = 10.0  # of a visitor with the store


class Lookup:
    """Of the adapters below `root`. Ask from event loops."""

    def __init__(self, root: str) -> None:
        store = Store(root)
        store.patience_s = PATIENCE_S
        self.catalogue = Catalogue(store)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="lookup")

    async def refusal(self, name: str | None) -> Failed | None:
        """What to tell who cannot have that adapter; None: it is known. What went wrong in the store is for the log alone."""
        if name is None or name in self.catalogue:
            return None
        try:
            finding = asyncio.get_running_loop().run_in_executor(self._threads, self.catalogue.find, name)
            await asyncio.wait_for(finding, WITHIN_S)
        except NoAdapter as error:
            logger.info("%s", error)
            return Failed(f"there is no adapter {name}", wrong=True)
        except Exception as error:  # whatever a store may raise
            logger.error("adapter %s could not be looked up: %s: %s", name, type(error).__name__, error)
            return Failed(f"the adapter {name} cannot be looked up at present; try again", retry=True)
        return None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
