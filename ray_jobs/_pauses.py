"""What hosts asked one task of a collect run, told to its other tasks wherever they are."""

from __future__ import annotations

from typing import Any

from momalisa.collect.pauses import PauseBook


class SharedPauses:
    """`momalisa.collect.pauses.Pauses` that travel to tasks: a book in an actor beside the driver."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        always: Any = {"max_restarts": -1, "max_task_retries": -1}  # a new one is empty: what is forgotten is heard once more
        self._book: Any = ray.remote(num_cpus=0, scheduling_strategy=here, **always)(PauseBook).remote()

    async def add(self, host: str, until: float) -> None:
        await self._book.add.remote(host, until)

    async def beyond(self, known: dict[str, float] | None) -> dict[str, float]:
        return dict(await self._book.beyond.remote(known))
