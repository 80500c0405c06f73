"""What the processes of a node share: fetched once, never seen half, gone with the last one that uses it."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from momalisa.training import node


def test_the_first_fetches_all_see_the_same_and_the_last_one_removes_it(tmp_path: Path) -> None:
    fetched, seen, together = list[Path](), list[str](), threading.Barrier(4)

    def fetch(place: Path) -> None:
        (place / "state").write_text("hal")
        time.sleep(0.2)  # the others are there by now
        (place / "state").write_text("whole")
        fetched.append(place)

    def use() -> None:
        with node.shared(tmp_path, "abc", fetch) as place:
            seen.append((place / "state").read_text())
            together.wait()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["whole"] * 4
    assert len(fetched) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_what_is_in_use_stays_and_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "state").write_text("half")
    with ExitStack() as held:
        held.enter_context(node.shared(tmp_path, "other", lambda place: (place / "state").write_text("other's")))
        with node.shared(tmp_path, "new", lambda place: (place / "mine").write_text("new")) as place:
            assert [path.name for path in place.iterdir()] == ["mine"]
            assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "new", "other"]
        assert (tmp_path / "other" / "state").read_text() == "other's"


def test_what_cannot_be_fetched_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fails(place: Path) -> None:
        (place / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(OSError, match=r"could not be kept in .*; free space or set train.cache_dir"),
        node.shared(tmp_path, "a", fails),
    ):
        pass
    with pytest.raises(ValueError, match="has sha256"), node.shared(tmp_path, "a", lambda place: damaged()):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    with node.shared(tmp_path, "a", lambda place: (place / "state").write_text("whole")) as place:
        assert (place / "state").read_text() == "whole"


def damaged() -> None:
    raise ValueError("has sha256")
