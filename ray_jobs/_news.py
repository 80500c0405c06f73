"""What hosts said to one task of a collect run, told to its other tasks wherever they are."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from momalisa.collect.news import PATIENCE_S, Heard, NewsBook

logger = logging.getLogger(__name__)


class SharedNews:
    """`momalisa.collect.news.News` that travel to tasks: a book in an actor beside the driver.

    Where the actor does not answer, each task goes on with what it hears itself.
    """

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        always: Any = {"max_restarts": -1, "max_task_retries": -1}  # a new one is empty: what is forgotten is heard once more
        self._book: Any = ray.remote(num_cpus=0, scheduling_strategy=here, **always)(NewsBook).remote()

    async def pause(self, host: str, until: float) -> None:
        await self._answer(self._book.pause.remote(host, until))

    async def block(self, host: str) -> None:
        await self._answer(self._book.block.remote(host))

    async def beyond(self, known: Heard | None) -> Heard:
        found: Heard | None = await self._answer(self._book.beyond.remote(known))
        return found or known or Heard()

    async def _answer(self, asked: Any) -> Any:
        """The actor's; None, after a while, where it has none."""
        from ray.exceptions import RayError

        try:
            return await asyncio.wait_for(asked, 2 * PATIENCE_S)
        except TimeoutError:
            logger.warning("what hosts say to other tasks is unknown at present")
        except RayError as error:
            logger.warning("what hosts say to other tasks is unknown at present: %s", type(error).__name__)
            await asyncio.sleep(PATIENCE_S)
        return None
