"""Each sample once an epoch, the same cells whoever shares them, and no cell mixes shapes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from momalisa.config import Train
from momalisa.training.sampler import Cell, Cells, deal, passes

seeds, sizes = st.integers(0, 2**32), st.integers(1, 7)
counts = st.lists(st.integers(1, 17), min_size=1, max_size=4)


def buckets_of(works: list[int]) -> list[list[int]]:
    """Buckets of so many works each, numbered through."""
    firsts = [sum(works[:place]) for place in range(len(works))]
    return [list(range(first, first + count)) for first, count in zip(firsts, works, strict=True)]


@settings(deadline=None)
@given(seed=seeds, works=counts, size=sizes, epochs=st.integers(1, 4))
def test_every_work_is_seen_exactly_once_an_epoch_of_its_bucket(seed: int, works: list[int], size: int, epochs: int) -> None:
    cells = Cells(seed, buckets_of(works), size)
    seen = Counter(sample for cell in cells.run(0, cells._first(epochs)) for sample in cell.samples)
    for epoch in range(epochs):
        assert all(seen[(epoch, index)] == 1 for index in range(sum(works)))
    assert sum(seen.values()) < epochs * sum(works) + size * len(works)  # no more than each bucket's last cell needs


@settings(deadline=None)
@given(seed=seeds, works=counts, size=sizes, cuts=st.lists(st.integers(0, 9), max_size=6))
def test_the_sequence_does_not_know_how_it_is_cut(seed: int, works: list[int], size: int, cuts: list[int]) -> None:
    whole: list[Cell] = []
    for cut in cuts:
        whole += Cells(seed, buckets_of(works), size).run(len(whole), cut)
    assert whole == Cells(seed, buckets_of(works), size).run(0, sum(cuts))


@settings(deadline=None)
@given(seed=seeds, works=counts, size=sizes, start=st.integers(0, 500))
def test_a_cell_holds_works_of_one_bucket(seed: int, works: list[int], size: int, start: int) -> None:
    buckets = buckets_of(works)
    for cell in Cells(seed, buckets, size).run(start, 5):
        assert len(cell.samples) == size
        assert {index for _, index in cell.samples} <= set(buckets[cell.bucket])


@given(cells=st.integers(0, 20), workers=st.integers(1, 6))
def test_dealing_is_an_even_partition(cells: int, workers: int) -> None:
    batch = [Cell(0, ((0, number),)) for number in range(cells)]
    hands = [deal(batch, rank, workers) for rank in range(workers)]
    assert Counter(cell for hand in hands for cell in hand) == Counter(batch)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


@given(cells=st.integers(1, 20), size=sizes, workers=st.integers(1, 6), fewer=st.integers(1, 6))
def test_the_share_is_what_the_fewest_workers_can_get(cells: int, size: int, workers: int, fewer: int) -> None:
    workers, batch = min(workers, cells), [Cell(0, ((0, number),) * size) for number in range(cells)]
    fewer = min(fewer, workers)
    for least, group in ((None, workers), (fewer, fewer)):
        train = Train(batch=cells * size, cell=size, workers=workers, min_workers=least)
        hands = [sum(len(cell.samples) for cell in deal(batch, rank, group)) for rank in range(group)]
        assert train.share == train.share_of(group) == max(hands)


@settings(deadline=None)
@given(seed=seeds, works=counts, size=sizes, most=st.one_of(st.none(), st.integers(1, 9)))
def test_passes_hold_every_sample_once_and_one_shape_each(seed: int, works: list[int], size: int, most: int | None) -> None:
    buckets = buckets_of(works)
    bucket_of = {index: place for place, bucket in enumerate(buckets) for index in bucket}
    batch = Cells(seed, buckets, size).run(3, 6)
    found = passes(batch, most)
    assert Counter(sample for part in found for sample in part) == Counter(s for cell in batch for s in cell.samples)
    assert all(len({bucket_of[index] for _, index in part}) == 1 for part in found)
    assert all(len(part) <= (most or 10**9) for part in found)


def test_order_and_mixture_change_with_epoch_and_seed() -> None:
    buckets = buckets_of([40, 40])
    epochs = [Cells(seed, buckets, 4).run(first, 20) for seed, first in ((0, 0), (0, 20), (1, 0))]
    assert len({tuple(sample for cell in cells for _, sample in cell.samples) for cells in epochs}) == 3
    assert len({tuple(cell.bucket for cell in cells) for cells in epochs}) == 3
    together = {frozenset(frozenset(index for _, index in cell.samples) for cell in cells) for cells in epochs}
    assert len(together) == 3  # who shares a cell changes too, not only the order of cells
