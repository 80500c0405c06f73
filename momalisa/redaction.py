"""Keeps secrets out of what is written: logs, errors, configurations, W&B."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|CREDENTIALS_JSON)$", re.IGNORECASE)
SHORTEST = 6  # characters: below that a value is no secret, and hiding it would hide ordinary words
USER_INFO = re.compile(r"(?<=://)[^/\s@:]+:[^/\s@]+(?=@)")
SIGNATURE = re.compile(r"(?i)([?&](?:sig|signature|x-goog-signature|x-amz-signature|token|key|api_key|access_token)=)[^&\s#'\"]+")
BEARER = re.compile(r"(?i)(bearer\s+)[^\s'\",]+")


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without values of secret environment variables, passwords and signatures in URLs, and bearer tokens."""
    for name, value in sorted((os.environ if environment is None else environment).items(), key=lambda item: -len(item[1])):
        if len(value) >= SHORTEST and NAME.search(name) and not value.startswith(("/", "{{")):
            text = text.replace(value, HIDDEN)
    text = USER_INFO.sub(HIDDEN, text)
    text = SIGNATURE.sub(rf"\1{HIDDEN}", text)
    return BEARER.sub(rf"\1{HIDDEN}", text)


def redacted(value: Any) -> Any:
    """A structure of dicts, lists and texts, each text redacted, and the value of each secretly named key hidden."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(item, str) and item and NAME.search(str(key)) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return redact(value) if isinstance(value, str) else value
