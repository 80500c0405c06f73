"""The training set in memory."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from momalisa.dataset import Dataset
from momalisa.records import LATENTS, MIRRORED_LATENTS, OK, REJECTED
from momalisa.training import cache as caches
from momalisa.training.cache import LatentCache


def cache_of(names: list[str]) -> LatentCache:
    """A cache whose every field tells which row it is."""
    numbers = torch.tensor([sum(name.encode()) % 1000 for name in names])
    moments = numbers.half().view(-1, 1, 1, 1).expand(-1, 2, 1, 1).contiguous()
    return LatentCache(list(names), [f"a {name}" for name in names], moments, numbers.view(-1, 1), mirrored=-moments)


def row(work_id: str, value: float, channels: int = 2, side: int = 2, status: str = OK) -> dict[str, Any]:
    moments = np.full((2 * channels, side, side), value, dtype="<f2")
    moments[channels:] = -1
    return {
        "id": work_id,
        "moments": moments.tobytes(),
        "channels": channels,
        "height": side,
        "width": side,
        "caption": f"A MOMA artwork of: {work_id}",
        "token_ids": [1, int(value), 2],
        "status": status,
        "error": "" if status == OK else "too dark",
    }


def mirrored(work: dict[str, Any]) -> dict[str, Any]:
    return {**work, "mirrored": (np.frombuffer(work["moments"], "<f2") + np.float16(0.5)).tobytes()}


def dataset_cache(dataset: Dataset) -> Path:
    return Path(dataset.store.root) / "cache"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(str(tmp_path))


def test_good_rows_of_all_tables_by_id(dataset: Dataset) -> None:
    tables = [
        dataset.put_rows("latents/x", [row("c", 3), row("bad", 9, status=REJECTED)], LATENTS),
        dataset.put_rows("latents/x", [row("a", 1), row("b", 2)], LATENTS),
    ]
    found = caches.load(dataset, tables, dataset_cache(dataset))
    assert found.ids == ["a", "b", "c"]
    assert found.captions[2] == "A MOMA artwork of: c"
    moments = found.stacked()
    assert moments.shape == (3, 4, 2, 2)
    assert moments.dtype == torch.float16
    assert moments[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert moments[1, 2:].unique().tolist() == [-1]
    assert found.token_ids.tolist() == [[1, 1, 2], [1, 2, 2], [1, 3, 2]]


def test_nothing_good_is_an_error(dataset: Dataset) -> None:
    table = dataset.put_rows("latents/x", [row("bad", 9, status=REJECTED)], LATENTS)
    with pytest.raises(ValueError, match="no work was encoded without an error"):
        caches.load(dataset, [table], dataset_cache(dataset))


def test_a_node_fetches_once_and_its_processes_share(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, folder = dataset.put_rows("latents/x", [row("a", 1), row("b", 2, side=3)], LATENTS), tmp_path / "cache"
    first = caches.load(dataset, [table], folder)
    monkeypatch.setattr(Dataset, "rows", lambda *arguments: pytest.fail("fetched again"))
    again = caches.load(dataset, [table], folder)
    assert (again.ids, again.captions, again.token_ids.tolist()) == (first.ids, first.captions, first.token_ids.tolist())
    assert all(torch.equal(one, other) for one, other in zip(first.moments, again.moments, strict=True))
    (file,) = folder.glob("*.f16")
    assert file.stat().st_size == sum(moments.numel() for moments in first.moments) * 2
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if file.name in line]
    assert len(mapped) == 2  # files, not memory


def test_what_a_killed_process_left_is_made_anew(dataset: Dataset, tmp_path: Path) -> None:
    table, folder = dataset.put_rows("latents/x", [row("a", 1), row("b", 2)], LATENTS), tmp_path / "cache"
    expected = caches.load(dataset, [table], folder)
    (index,) = folder.glob("*.parquet")
    index.unlink()  # it is written last
    index.with_suffix(".making").write_bytes(b"half")
    found = caches.load(dataset, [table], folder)
    assert torch.equal(found.stacked(), expected.stacked())
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".f16", ".parquet"]


def test_a_file_that_a_power_failure_cut_short_is_fetched_anew(dataset: Dataset, tmp_path: Path) -> None:
    """The index was on the disk, pages of the moments were not; to read them would end the process."""
    table, folder = dataset.put_rows("latents/x", [row("a", 1), row("b", 2)], LATENTS), tmp_path / "cache"
    expected = caches.load(dataset, [table], folder).stacked()
    (file,) = folder.glob("*.f16")
    for size in (0, file.stat().st_size - 2):
        os.truncate(file, size)
        assert torch.equal(caches.load(dataset, [table], folder).stacked(), expected)
    for lost in (file, file.with_suffix(".parquet")):
        lost.unlink()
        assert torch.equal(caches.load(dataset, [table], folder).stacked(), expected)
    os.truncate(file.with_suffix(".parquet"), 100)
    assert torch.equal(caches.load(dataset, [table], folder).stacked(), expected)


def test_files_are_on_the_disk_before_they_have_their_names(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, folder = dataset.put_rows("latents/x", [row("a", 1)], LATENTS), tmp_path / "cache"
    done, fsync, rename = list[str](), os.fsync, Path.rename

    def synced(opened: int) -> None:
        fsync(opened)
        done.append(Path(f"/proc/self/fd/{opened}").readlink().suffix)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"{path.suffix} is {target.suffix}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    caches.load(dataset, [table], folder)
    assert done == [".making", ".making is .f16", "", ".making", ".making is .parquet", ""]  # "": the folder


def test_files_that_nobody_uses_make_room(dataset: Dataset, tmp_path: Path) -> None:
    tables = [dataset.put_rows("latents/x", [row("a", number), row("b", number)], LATENTS) for number in (1, 2, 3)]
    held = caches.load(dataset, [tables[0]], tmp_path / "cache")
    (tmp_path / "cache" / "my own.f16").write_bytes(b"mine")
    caches.load(dataset, [tables[1]], tmp_path / "cache")  # let go at once
    gc.collect()
    caches.load(dataset, [tables[2]], tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.f16"))) == 3
    assert (tmp_path / "cache" / "my own.f16").read_bytes() == b"mine"
    assert held.stacked()[0, 0, 0, 0] == 1


def test_latents_of_several_sizes_are_several_buckets(dataset: Dataset) -> None:
    rows = [row("a", 1), row("b", 2, side=3), row("c", 4)]
    found = caches.load(dataset, [dataset.put_rows("latents/x", rows, LATENTS)], dataset_cache(dataset))
    assert found.buckets() == [[0, 2], [1]]
    assert found.rows([0, 2]).stacked()[:, 0, 0, 0].tolist() == [1, 4]


def test_mirror_images_lie_beside_the_moments(dataset: Dataset) -> None:
    rows = [mirrored(work) for work in (row("c", 3), row("a", 1), row("b", 2, side=3))]
    table = dataset.put_rows("latents/x", rows, MIRRORED_LATENTS)
    for _ in range(2):  # fetched, and found
        found = caches.load(dataset, [table], dataset_cache(dataset))
        assert [float(moments[0, 0, 0]) for moments in found.moments] == [1, 2, 3]
        assert found.mirrored is not None
        for moments, mirror in zip(found.moments, found.mirrored, strict=True):
            assert torch.equal(mirror, moments + 0.5)
        assert found.buckets() == [[0, 2], [1]]
        part = found.rows([2, 0]).flipped(torch.tensor([False, True]))
        assert part.ids == ["c", "a"]
        assert part.stacked()[:, 0, 0, 0].tolist() == [3, 1.5]
    plain = caches.load(dataset, [dataset.put_rows("latents/y", rows, LATENTS)], dataset_cache(dataset))
    assert plain.mirrored is None


def test_some_works_and_the_others_keep_their_rows_whole() -> None:
    names = ["e", "a", "d", "b"]
    for part, expected in ((cache_of(names).only({"d", "e"}), ["e", "d"]), (cache_of(names).without({"d", "e"}), ["a", "b"])):
        again = cache_of(expected)
        assert (part.ids, part.captions) == (expected, again.captions)
        assert torch.equal(part.stacked(), again.stacked())
        assert torch.equal(part.token_ids, again.token_ids)
        where = torch.tensor([True, False])
        assert part.flipped(where).stacked()[:, 0, 0, 0].tolist() == [-again.moments[0][0, 0, 0], again.moments[1][0, 0, 0]]
