"""What every job file ends with: settings from the command line, one line about the result, errors for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from momalisa.config import Settings, command_line

TRACEBACK = "MOMALISA_TRACEBACK"


def job(
    doc: str | None,
    name: str,
    run: Callable[[Settings], dict[str, Any]],
    said: Callable[[dict[str, Any]], str],
    arguments: list[str] | None = None,
) -> None:
    """Run a job as a program: what `run` returned, said in one line; of a user's error the message alone, with exit status 1.

    `arguments`: what is left of the command line where the job has options of its own.
    $MOMALISA_TRACEBACK=1 shows where an error came from.
    """
    settings = command_line(doc, f"ray_jobs.{name}", arguments)
    try:
        summary = run(settings)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get(TRACEBACK):
            raise
        cause = getattr(error, "cause", error)  # Ray raises a task's error with its whole traceback as the message
        text = str(cause)
        sys.exit(text if text.startswith(f"{name}: ") else f"{name}: {text}")
    print(f"{name}: {said(summary)}", flush=True)


def pace(done: dict[str, Any]) -> str:
    """What a stage that fills tables did, and how fast."""
    counts = f"{done['new']} new, {done['rejected']} failed, {done['seconds']:.0f} s"
    per_s = done["pictures_per_s"]
    speed = f"{done['rows_per_s']:.1f} pictures/s (one decoder {per_s['one_decoder']:.1f}, one actor {per_s['one_actor']:.1f})"
    return f"{counts}, {speed}" if done["new"] else counts
