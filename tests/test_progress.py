"""A bar for a person, plain lines for a log, and neither too often."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momalisa.progress import EVERY_S, Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_a_line_now_and_then_and_one_at_the_end() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress("collect", 100, stream=log, clock=clock) as bar:
        for done in range(1, 101):
            clock.now += 0.25
            bar.update(done, rejected=done // 20)
    assert log.getvalue().splitlines() == [
        "collect: 20/100 works, 1 rejected, 4.0/s, 20 s left",
        "collect: 40/100 works, 2 rejected, 4.0/s, 15 s left",
        "collect: 60/100 works, 3 rejected, 4.0/s, 10 s left",
        "collect: 80/100 works, 4 rejected, 4.0/s, 5 s left",
        "collect: 100/100 works, 5 rejected, 4.0/s",
    ]


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_the_total_may_be_known_later(kind: type[io.StringIO]) -> None:
    clock, log = Clock(), kind()
    with Progress("collect", None, stream=log, clock=clock) as bar:
        clock.now += 10
        bar.update(5)
        assert bar.text() == "5 works, 0 rejected, 0.5/s"
        bar.total = 20
        bar.update(6)
        assert bar.text() == "6/20 works, 0 rejected, 0.6/s, 23 s left"
        assert bar._bar is None or bar._bar.tasks[0].total == 20


@given(st.lists(st.floats(0, 20), max_size=60))
def test_lines_are_never_close_and_never_overwrite(waits: list[float]) -> None:
    clock, log, times = Clock(), io.StringIO(), [100.0]
    with Progress("encode", len(waits), stream=log, clock=clock) as bar:
        for done, wait_s in enumerate(waits, 1):
            clock.now += wait_s
            before = log.getvalue()
            bar.update(done)
            if log.getvalue() != before:
                times.append(clock.now)
    assert all(later - earlier >= EVERY_S for earlier, later in itertools.pairwise(times))
    assert "\r" not in log.getvalue()
    assert "\x1b" not in log.getvalue()
    assert log.getvalue().endswith(f"encode: {len(waits)}/{len(waits)} works, 0 rejected, {bar.rate:.1f}/s\n") or not waits


def test_the_last_line_is_not_said_twice_and_nothing_is_not_said() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress("collect", 2, stream=log, clock=clock) as bar:
        clock.now += 10
        bar.update(2)
    assert log.getvalue().count("\n") == 1
    with Progress("collect", 2, stream=log, clock=clock):
        pass
    assert log.getvalue().count("\n") == 1


def test_the_rate_is_of_this_run() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress("caption", 100, done=90, rejected="failed", unit="pictures", stream=log, clock=clock) as bar:
        clock.now += 5
        bar.update(95, 1)
        assert bar.rate == pytest.approx(1.0)
    assert log.getvalue() == "caption: 95/100 pictures, 1 failed, 1.0/s, 5 s left\n"


def test_what_ends_with_an_error_says_how_far_it_came() -> None:
    clock, log = Clock(), io.StringIO()
    with pytest.raises(OSError, match="gone"), Progress("collect", 9, stream=log, clock=clock) as bar:  # noqa: PT012
        clock.now += 1
        bar.update(4)
        raise OSError("gone")
    assert log.getvalue() == "collect: 4/9 works, 0 rejected, 4.0/s, 1 s left\n"


def test_a_terminal_has_a_bar_with_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Terminal()
    with Progress("collect", 8, stream=screen) as bar:
        bar.update(4, rejected=1)
        print("another line", file=screen)
        bar.update(8, rejected=2)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "━" in shown
    assert re.search(r"collect .*8/8 works, 2 rejected, [\d.]+/s", shown)
    assert screen.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue()  # the cursor is back


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
