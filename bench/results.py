"""What every bench says: its figures as one JSON line, the hardware, and on demand a dated row of RESULTS.md."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("RESULTS.md")
COLUMNS = ("claim", "ours", "peer", "ratio", "hardware")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A bench's command line: its docstring, and --record."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--record", action="store_true", help="append a dated row to bench/RESULTS.md")
    return made


def processor() -> str:
    """The processor's name."""
    found = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return found[0] if found else platform.machine()


def report(figures: Mapping[str, Any], record: bool, rows: list[Mapping[str, Any]] | None = None) -> None:
    """Print the figures as the last line; append them, or the `rows` that they stand for, if they are to be kept."""
    if record:
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        with RESULTS.open("a", encoding="utf-8") as file:
            for row in rows or [figures]:
                file.write(f"| {' | '.join([today, *(str(row[name]) for name in COLUMNS)])} |\n")
    print(json.dumps(figures))
