"""Answers other than 200, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_NAMES = 20  # that a message holds


class ApiError(Exception):
    """What was wrong, with the field and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def listed(names: Sequence[str]) -> str:
    """What there is, at the end of a message about what there is not."""
    if not names:
        return "there is none"
    more = len(names) - MOST_NAMES
    shown = ", ".join(names[:MOST_NAMES])
    return f"there are {shown} and {more} more: GET /v1/models" if more > 0 else f"there are {shown}"
