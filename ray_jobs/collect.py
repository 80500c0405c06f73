"""collect: fetch the works of a museum or a folder that the dataset lacks, clean their pictures, publish a version.

    python -m ray_jobs.collect --config configs/demo.yaml [--collect.source.limit=50 ...]
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.collect --config configs/sd14.yaml

The demo's museum opens with `python -m momalisa.miniature.wing`. Run the job again when the museum has hung new works:
what was collected, or rejected, is passed by. A picture that cannot be used is a row that says why; above
collect.max_bad_fraction nothing is published.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from momalisa.config import Collect, Settings
from ray_jobs._job import job


def run(settings: Settings) -> dict[str, Any]:
    """Collect what is new, publish it, and return the stage's summary. Raises ValueError if too much was bad."""
    from momalisa.collect import duplicates
    from momalisa.collect.sources import open_source
    from momalisa.dataset import Dataset

    began, dataset, chosen = time.monotonic(), Dataset(settings.dataset), settings.collect
    known = dataset.ids(dataset.latest().images)
    source = open_source(chosen)
    listed = list(source.works())
    new = [work for work in listed if work.id not in known]
    if not new and not known:
        raise ValueError(f"{chosen.source.location} lists no work to collect ({source.not_on_view} are not on view)")
    paths: list[str] = []
    errors: Counter[str] = Counter()
    for stored in _blocks(settings, new):
        paths.append(stored.path)
        errors.update(stored.errors)
    _judge(errors, len(new), chosen)
    version = duplicates.collected(dataset, paths, chosen.duplicates)
    if version != dataset.latest():
        dataset.publish(version)
    ok = dataset.ids(dataset.latest().images, only_ok=True)
    ids = {work.id for work in listed}
    if not new:
        print(f"collect: nothing new ({len(ok)} works)", flush=True)
    seconds = time.monotonic() - began
    return {
        "stage": "collect",
        "rows_in": len(ids),
        "rows_out": len(ids & ok),
        "rejected": len(ids - ok),
        "duplicates": len(ids & duplicates.known(dataset, version).keys()),
        "new": len(new),
        "skipped": len(ids) - len(new),
        "not_on_view": source.not_on_view,
        "seconds": seconds,
        "rows_per_s": len(new) / seconds,
    }


def _blocks(settings: Settings, works: list[Any]) -> Iterator[Any]:
    """Store block by block in Ray tasks; yields what was `Stored`."""
    if not works:
        return
    import ray

    from momalisa.collect.block import store_block
    from momalisa.progress import Progress
    from ray_jobs._cluster import connect

    connect()
    chosen, size = settings.collect, settings.collect.block_size
    waiting = [works[start : start + size] for start in range(0, len(works), size)]
    at_a_time = min(chosen.tasks, chosen.per_host)  # so that per_host holds over all tasks
    task: Any = ray.remote(num_cpus=settings.ray_cpus_per_task)(store_block)
    running: list[Any] = []
    blocked: set[str] = set()
    done = rejected = 0
    with Progress("collect", len(works)) as bar:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(task.remote(settings.dataset, waiting.pop(0), chosen, chosen.per_host // at_a_time, blocked))
            finished, running = ray.wait(running, num_returns=1)
            stored = ray.get(finished[0])
            blocked = blocked | stored.blocked
            done, rejected = done + stored.works, rejected + stored.errors.total()
            bar.update(done, rejected)
            yield stored


def _judge(errors: Counter[str], total: int, chosen: Collect) -> None:
    if errors.total() > chosen.max_bad_fraction * total:
        reasons = "; ".join(f"{count} x {error}" for error, count in errors.most_common(3))
        raise ValueError(
            f"collect: {errors.total()} of {total} works were rejected, more than max_bad_fraction={chosen.max_bad_fraction:g}; "
            f"nothing was published. The most common reasons: {reasons}"
        )


def main() -> None:
    job(__doc__, "collect", run, said)


def said(summary: dict[str, Any]) -> str:
    counts = (
        f"{summary['rows_out']} works, {summary['new']} new, {summary['rejected']} rejected, {summary['duplicates']} duplicates"
    )
    return f"{counts}, {summary['not_on_view']} not on view, {summary['seconds']:.0f} s"


if __name__ == "__main__":
    main()
