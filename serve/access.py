"""Who is asking, and whether they may: API keys with scopes, expiry and a rate each.

Without a file of keys everybody may do everything, and what is fair is fair among addresses.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from serve import keys
from serve.errors import ApiError
from serve.keys import Key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """`id`: a key's, or an address."""

    id: str
    kiosk: bool = False


class Rate:
    """A bucket of `per_minute` requests that fills evenly."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_s, self._full = per_minute / 60, max(1.0, per_minute / 6)
        self._left, self._at = self._full, now

    def take(self, now: float) -> float:
        """0, or how many seconds too early this is."""
        self._left = min(self._full, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._per_s
        self._left -= 1
        return 0.0


class Access:
    """`path`: the file of keys, or empty. Raises ValueError where it cannot be read at the start."""

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = Path(path) if path else None, clock
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._rates: dict[str, tuple[int, Rate]] = {}
        if self._path is not None:
            self._keys = {key.sha256: key for key in keys.read(self._path)}
            self._stamp = self._stamp_now()

    def caller(self, authorization: str | None, address: str, scope: str) -> Caller:
        """Raises ApiError: 401 without a good key, 403 without the scope, 429 above the key's rate."""
        if self._path is None:
            return Caller(address)
        self._read_again()
        key = self._key(authorization)
        if scope not in key.scopes:
            message = f"this key may {', '.join(key.scopes) or 'nothing'}; this needs the scope {scope}"
            raise ApiError(403, message, code="insufficient_scope", kind="permission_error")
        limit, rate = self._rates.get(key.id) or (0, None)
        if rate is None or limit != key.requests_per_minute:
            rate = Rate(key.requests_per_minute, self._clock())
            self._rates[key.id] = (key.requests_per_minute, rate)
        if early := rate.take(self._clock()):
            message = f"this key may ask {key.requests_per_minute} times a minute"
            raise ApiError(429, message, None, "rate_limit_exceeded", "rate_limit_error", math.ceil(early))
        return Caller(key.id, "kiosk" in key.scopes)

    def _key(self, authorization: str | None) -> Key:
        kind, _, secret = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not secret:
            message = "an API key is needed: Authorization: Bearer ..."
            raise ApiError(401, message, code="missing_api_key", kind="authentication_error")
        key = self._keys.get(keys.digest(secret.strip()))
        if key is None or key.expired(datetime.now(UTC)):
            code = "invalid_api_key" if key is None else "expired_api_key"
            message = "this API key is not known" if key is None else f"this API key has expired ({key.expires})"
            raise ApiError(401, message, code=code, kind="authentication_error")
        return key

    def _read_again(self) -> None:
        """When the file has changed. One that cannot be read changes nothing: the last good keys hold."""
        assert self._path is not None
        stamp = self._stamp_now()
        if stamp is None or stamp == self._stamp:
            return
        try:
            self._keys = {key.sha256: key for key in keys.read(self._path)}
        except ValueError as error:
            logger.error("%s", error)
        self._stamp = stamp
        known = {key.id for key in self._keys.values()}
        self._rates = {id_: rate for id_, rate in self._rates.items() if id_ in known}

    def _stamp_now(self) -> tuple[int, int] | None:
        assert self._path is not None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino
