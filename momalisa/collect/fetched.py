"""What came of a URL: bytes, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from momalisa.records import Reason


@dataclass(frozen=True)
class Validators:
    """What a host said about a version of a picture, to be said back when it is asked again (RFC 9110, section 13)."""

    etag: str = ""
    last_modified: str = ""

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> Validators:
        """A response's; one that is no UTF-8 is passed by: it cannot be stored, and would not be said back as it was."""
        found = (headers.get(name, "") for name in ("ETag", "Last-Modified"))
        return cls(*(value if value.isprintable() else "" for value in found))

    def __bool__(self) -> bool:
        return bool(self.etag or self.last_modified)

    @property
    def headers(self) -> dict[str, str]:
        said = {"If-None-Match": self.etag, "If-Modified-Since": self.last_modified}
        return {name: value for name, value in said.items() if value}


NOTHING_SAID = Validators()


@dataclass(frozen=True)
class Fetched:
    """What became of a URL: its bytes, or an error that says why there are none, and its reason in one word."""

    data: bytes = b""
    error: str = ""
    reason: Reason = Reason.OK
    validators: Validators = NOTHING_SAID
    status: int = 0  # HTTP's, of an answer that is an error


class Ended(Exception):
    """No bytes, and no sense in trying again."""

    def __init__(self, reason: Reason, error: str, status: int = 0) -> None:
        super().__init__(error)
        self.reason, self.status = reason, status


class TryAgain(Exception):
    """No bytes this time."""

    def __init__(self, reason: Reason, error: str, status: int = 0, wait_s: float = 0.0) -> None:
        super().__init__(error)
        self.reason, self.status = reason, status
        self.wait_s = wait_s  # what the host asked for
