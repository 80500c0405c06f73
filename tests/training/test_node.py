"""What the processes of a node share: fetched once, never seen half, gone with the last one that uses it."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from momalisa.training import node

NAME, OTHER, OLD = "0123456789abcdef01234567", "f" * 24, "0" * 24


def test_the_first_fetches_all_see_the_same_and_the_last_one_removes_it(tmp_path: Path) -> None:
    fetched, seen, together = list[Path](), list[str](), threading.Barrier(4)

    def fetch(place: Path) -> None:
        (place / "state").write_text("hal")
        time.sleep(0.2)  # the others are there by now
        (place / "state").write_text("whole")
        fetched.append(place)

    def use() -> None:
        with node.shared(tmp_path, NAME, fetch) as place:
            seen.append((place / "state").read_text())
            together.wait(30)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["whole"] * 4
    assert len(fetched) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entering", "lock"]


def test_what_is_in_use_or_the_users_stays_and_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    (tmp_path / "my own").mkdir()
    (tmp_path / "my own" / "notes").write_text("mine")
    (tmp_path / OLD).mkdir()
    (tmp_path / f"{NAME}.partial").mkdir()
    (tmp_path / f"{NAME}.partial" / "state").write_text("half")
    with ExitStack() as held:
        held.enter_context(node.shared(tmp_path, OTHER, lambda place: (place / "state").write_text("other's")))
        with node.shared(tmp_path, NAME, lambda place: (place / "mine").write_text("new")) as place:
            assert [path.name for path in place.iterdir()] == ["mine"]
            assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "entering", OTHER, "lock", "my own"]
        assert (tmp_path / OTHER / "state").read_text() == "other's"
    assert (tmp_path / "my own" / "notes").read_text() == "mine"


def test_a_whole_folder_that_nobody_holds_is_fetched_again(tmp_path: Path) -> None:
    """Its process was killed, and the machine may have gone down before the disk had all of it."""
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "state").write_bytes(bytes(5))
    with node.shared(tmp_path, NAME, lambda place: (place / "state").write_text("whole")) as place:
        assert (place / "state").read_text() == "whole"


def test_who_leaves_does_not_wait_for_the_download_of_another(tmp_path: Path) -> None:
    begun, go_on, seen = threading.Event(), threading.Event(), list[str]()

    def fetch(place: Path) -> None:
        (place / "state").write_text("whole")
        begun.set()
        assert go_on.wait(30)

    def use() -> None:
        with node.shared(tmp_path, OTHER, fetch) as place:
            seen.append((place / "state").read_text())

    downloading = threading.Thread(target=use)
    with node.shared(tmp_path, NAME, lambda place: None):
        downloading.start()
        assert begun.wait(30)
    assert not (tmp_path / NAME).exists()
    assert not seen
    go_on.set()
    downloading.join()
    assert seen == ["whole"]


def test_what_cannot_be_fetched_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fails(place: Path) -> None:
        (place / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(OSError, match=r"could not be kept in .*; free space or set train.cache_dir"),
        node.shared(tmp_path, NAME, fails),
    ):
        pass
    with pytest.raises(ValueError, match="has sha256"), node.shared(tmp_path, NAME, lambda place: damaged()):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entering", "lock"]
    with node.shared(tmp_path, NAME, lambda place: (place / "state").write_text("whole")) as place:
        assert (place / "state").read_text() == "whole"


def damaged() -> None:
    raise ValueError("has sha256")
