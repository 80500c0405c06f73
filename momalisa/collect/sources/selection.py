"""Which works of a source are wanted: on view, of some departments or classifications, each once, so many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from momalisa.config import Source
from momalisa.records import Artwork

NOT_ON_VIEW = "not on view"
Wanted = Callable[[str], bool]  # a work's id -> whether the run asks for it


def selected(
    works: Iterable[tuple[Artwork, bool]], source: Source, left_out: Counter[str], distinct: bool = False
) -> Iterator[Artwork]:
    """Of (work, is it on view) pairs, the wanted works; the others are counted in `left_out` by why.

    The first work of an id counts. Ids are held in memory, unless all are known to be `distinct`; works are not.
    """
    departments, classifications = _names(source.departments), _names(source.classifications)
    seen: set[str] = set()
    chosen = 0
    for work, on_view in works:
        if source.on_view_only and not on_view:
            left_out[NOT_ON_VIEW] += 1
        elif departments and work.department.casefold() not in departments:
            left_out["another department"] += 1
        elif classifications and work.classification.casefold() not in classifications:
            left_out["another classification"] += 1
        elif work.id in seen:
            left_out["listed twice"] += 1
        else:
            if not distinct:
                seen.add(work.id)
            chosen += 1
            yield work
            if chosen == source.limit:
                return


def _names(chosen: Iterable[str]) -> set[str]:
    return {name.strip().casefold() for name in chosen}
