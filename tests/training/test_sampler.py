"""Each sample once an epoch, the same stream whatever the batch, and every worker its own part."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from momalisa.training.sampler import Stream, share

seeds, counts = st.integers(0, 2**32), st.integers(1, 40)


@settings(deadline=None)
@given(seed=seeds, count=counts, batch=st.integers(1, 50), epochs=st.integers(1, 3))
def test_each_sample_exactly_once_an_epoch_at_any_batch_size(seed: int, count: int, batch: int, epochs: int) -> None:
    stream, seen = Stream(seed, count), []
    while len(seen) < epochs * count:
        seen += stream.run(len(seen), batch)
    for epoch in range(epochs):
        part = seen[epoch * count : (epoch + 1) * count]
        assert Counter(part) == Counter((epoch, sample) for sample in range(count))


@settings(deadline=None)
@given(seed=seeds, count=counts, sizes=st.lists(st.integers(0, 30), max_size=6))
def test_the_stream_does_not_know_how_it_is_cut(seed: int, count: int, sizes: list[int]) -> None:
    stream, whole = Stream(seed, count), []
    for size in sizes:
        whole += stream.run(len(whole), size)
    assert whole == stream.run(0, sum(sizes))


@given(batch=st.lists(st.tuples(st.integers(), st.integers()), max_size=12), workers=st.integers(1, 6))
def test_shares_are_a_partition_in_order(batch: list[tuple[int, int]], workers: int) -> None:
    batch = batch * workers
    shares = [share(batch, rank, workers) for rank in range(workers)]
    assert [item for part in shares for item in part] == batch
    assert len({len(part) for part in shares}) == 1


def test_the_order_changes_with_epoch_and_seed() -> None:
    orders = [Stream(seed, 30).order(epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    assert Stream(0, 30).order(1) == orders[1]
    assert orders[0] != list(range(30))
