"""API keys: a file of their hashes, which the server reads again whenever it has changed.

    python -m serve.keys add keys.json --name kiosk --scopes generate,edit,vote,kiosk --days 365
    python -m serve.keys list keys.json
    python -m serve.keys revoke keys.json ID

A key is shown once, when it is made; only its SHA-256 is kept (256 random bits need no salt and no stretching).
To rotate one: add a new one, hand it over, revoke the old one. Nothing is restarted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

SCOPES = ("generate", "edit", "vote", "metrics", "kiosk")


@dataclass(frozen=True)
class Key:
    """What is kept of a key."""

    id: str
    name: str
    sha256: str
    scopes: tuple[str, ...]
    expires: str | None = None  # ISO 8601 with a time zone; None: never
    requests_per_minute: int = 60

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= datetime.fromisoformat(self.expires)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def make(name: str, scopes: tuple[str, ...], days: float | None, requests_per_minute: int) -> tuple[Key, str]:
    """A new key and its secret. Raises ValueError for what cannot be."""
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise ValueError(f"scopes={','.join(unknown)} are not known; there are {', '.join(SCOPES)}")
    _check_rate(requests_per_minute)
    secret = f"moma_{secrets.token_urlsafe(32)}"
    expires = None if days is None else (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds")
    return Key(secrets.token_hex(4), name, digest(secret), scopes, expires, requests_per_minute), secret


def _check_rate(requests_per_minute: int) -> None:
    if not requests_per_minute >= 1:
        raise ValueError(f"requests_per_minute={requests_per_minute} must be at least 1")


def read(path: Path) -> list[Key]:
    """Raises ValueError for a file that is none of ours."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["keys"]
        found = [Key(**{**row, "scopes": tuple(row["scopes"])}) for row in rows]
        for key in found:
            key.expired(datetime.now(UTC))
            _check_rate(key.requests_per_minute)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of API keys: {error}; python -m serve.keys add makes one") from error
    return found


def write(path: Path, keys: list[Key]) -> None:
    """Whole or not at all, readable by its owner only."""
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    with os.fdopen(handle, "w", encoding="utf-8") as sink:
        sink.write(text)
        sink.flush()
        os.fsync(sink.fileno())
    Path(name).replace(path)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    path = Path(options.file)
    try:
        known = read(path) if path.exists() else []
        if options.command == "add":
            scopes = tuple(options.scopes.split(","))
            key, secret = make(options.name, scopes, options.days, options.requests_per_minute)
            write(path, [*known, key])
            print(f"{key.id}\n{secret}")
        elif options.command == "revoke":
            if options.id not in {key.id for key in known}:
                raise ValueError(f"{path} holds no key {options.id}")
            write(path, [key for key in known if key.id != options.id])
        else:
            for key in known:
                expires = key.expires or "never expires"
                print(f"{key.id}\t{key.name}\t{','.join(key.scopes)}\t{expires}\t{key.requests_per_minute}/min")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a key and print its id and its secret, once")
    add.add_argument("file")
    add.add_argument("--name", required=True)
    add.add_argument("--scopes", default="generate,edit", help=", ".join(SCOPES))
    add.add_argument("--days", type=float, default=None, help="until it expires; default: never")
    add.add_argument("--requests-per-minute", type=int, default=60)
    commands.add_parser("list", help="what there is, without secrets").add_argument("file")
    revoke = commands.add_parser("revoke", help="a key by its id")
    revoke.add_argument("file")
    revoke.add_argument("id")
    return parser


if __name__ == "__main__":
    sys.exit(main())
