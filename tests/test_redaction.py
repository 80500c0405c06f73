"""No secret in what is written: by rule, and in every file and line of a miniature run with planted ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momalisa.redaction import HIDDEN, redact, redacted

SECRET = "planted-secret-0123456789"


@pytest.mark.parametrize(
    "name", ["RUNPOD_API_KEY", "RAY_AUTH_TOKEN", "wandb_api_key", "REDIS_PASSWORD", "GOOGLE_CREDENTIALS_JSON", "A_SECRET"]
)
def test_values_of_secret_variables_go(name: str) -> None:
    assert redact(f"it said {SECRET}.", {name: SECRET}) == f"it said {HIDDEN}."


@pytest.mark.parametrize("name", ["HOME", "KEYBOARD", "TOKENIZERS_PARALLELISM", "MONKEY_BUSINESS"])
def test_values_of_other_variables_stay(name: str) -> None:
    assert redact(f"in {SECRET}", {name: SECRET}) == f"in {SECRET}"


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (f"GET https://me:{SECRET}@host/x", f"GET https://{HIDDEN}@host/x"),
        (f"gs://b/x?X-Goog-Signature={SECRET}&a=1", f"gs://b/x?X-Goog-Signature={HIDDEN}&a=1"),
        (f"Authorization: Bearer {SECRET}", f"Authorization: Bearer {HIDDEN}"),
        ("https://media.moma.org/a.jpg?sha=1f2e", "https://media.moma.org/a.jpg?sha=1f2e"),
    ],
)
def test_secrets_by_their_place(said: str, left: str) -> None:
    assert redact(said, {}) == left


def test_a_structure_keeps_its_shape() -> None:
    value = {"wandb_api_key": SECRET, "deep": [{"url": f"https://u:{SECRET}@h/"}, 3, None], "empty_token": "", "key": ("a", 1)}
    left = {"wandb_api_key": HIDDEN, "deep": [{"url": f"https://{HIDDEN}@h/"}, 3, None], "empty_token": "", "key": ("a", 1)}
    assert redacted(value) == left


@given(text=st.text(max_size=60), secret=st.text(alphabet="abcdefghij0123456789-_", min_size=12, max_size=40))
def test_nothing_of_a_secret_survives(text: str, secret: str) -> None:
    assert secret not in redact(f"{text}{secret}{text}", {"X_TOKEN": secret})
