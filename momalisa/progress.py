"""How far a stage has come: a live bar where a person watches, a plain line now and then in a log.

with Progress("collect", total=124) as bar:
    bar.update(done=40, rejected=3)

collect: 40/124 works, 3 rejected, 21.3/s, 4 s left
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

EVERY_S = 5.0  # between two lines of a log


class Progress:
    """One stage's progress on `stream` (default: stdout). Rates and times count what was done since it began."""

    def __init__(
        self,
        stage: str,
        total: int | None,
        *,
        done: int = 0,
        unit: str = "works",
        rejected: str = "rejected",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total`: None where nobody knows it yet; it may be set later; `done`: what an earlier run had done already;
        `rejected`: what those that failed are called, empty where nothing can fail."""
        self.stage, self.total, self.done, self.unit = stage, total, done, unit
        self.bad, self._bad_name, self.note = 0, rejected, ""
        self._before, self._clock = done, clock
        self._stream = sys.stdout if stream is None else stream
        self._began = self._printed = clock()
        self._said = ""
        self._bar = _bar(self._stream) if self._stream.isatty() else None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.done, text=self.text())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._say()

    def update(self, done: int, rejected: int = 0, note: str = "") -> None:
        """Say how many are done by now, the rejected among them, how many of these are rejected, and what else there is."""
        self.done, self.bad, self.note = done, rejected, note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, text=self.text())
        elif self._clock() - self._printed >= EVERY_S:
            self._say()

    @property
    def rate(self) -> float:
        """Done per second since the beginning."""
        elapsed_s = self._clock() - self._began
        return (self.done - self._before) / elapsed_s if elapsed_s > 0 else 0.0

    def text(self) -> str:
        """`40/124 works, 3 rejected, 21.3/s, 4 s left`"""
        known = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        bad = f"{self.bad} {self._bad_name}" if self._bad_name else ""
        parts = [part for part in (f"{known} {self.unit}", bad, self.note, f"{self.rate:.1f}/s") if part]
        if self.rate > 0 and self.total is not None and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / self.rate)} left")
        return ", ".join(parts)

    def _say(self) -> None:
        """A line of its own, unless nothing was done since the last one."""
        self._printed = self._clock()
        if self._said != (said := f"{self.done} {self.bad}") and self.done > self._before:
            self._said = said
            print(f"{self.stage}: {self.text()}", file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(file=stream)
    columns = SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
    return Bars(*columns, console=console, refresh_per_second=4)
