"""Keys: made once, kept as hashes, rotated while the server runs; scopes, expiry and rates."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serve import keys
from serve.access import Access
from serve.errors import ApiError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def add(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[str, str]:
    assert keys.main(["add", str(path), "--name", "hall", *more]) == 0
    id_, secret = capsys.readouterr().out.split()
    return id_, secret


def refused(access: Access, secret: str | None, scope: str = "generate") -> ApiError:
    with pytest.raises(ApiError) as caught:
        access.caller(None if secret is None else f"Bearer {secret}", "1.2.3.4", scope)
    return caught.value


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    id_, secret = add(path, capsys)
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    keys.main(["list", str(path)])
    shown = capsys.readouterr().out
    assert id_ in shown
    assert "hall" in shown
    assert secret not in shown
    assert Access(str(path)).caller(f"Bearer {secret}", "1.2.3.4", "generate").id == id_


def test_keys_are_rotated_without_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    old_id, old = add(path, capsys)
    access = Access(str(path))
    _, new = add(path, capsys)
    access.caller(f"Bearer {new}", "", "generate")
    assert keys.main(["revoke", str(path), old_id]) == 0
    assert refused(access, old).code == "invalid_api_key"
    access.caller(f"Bearer {new}", "", "generate")
    path.write_text("{")  # somebody's editor: the last good keys hold
    access.caller(f"Bearer {new}", "", "generate")
    path.unlink()
    access.caller(f"Bearer {new}", "", "generate")


def test_who_is_not_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    _, secret = add(path, capsys, "--scopes", "generate")
    access = Access(str(path))
    assert (refused(access, None).status, refused(access, None).code) == (401, "missing_api_key")
    assert refused(access, "").code == "missing_api_key"
    assert refused(access, "moma_guess").code == "invalid_api_key"
    assert (refused(access, secret, "edit").status, refused(access, secret, "edit").code) == (403, "insufficient_scope")
    assert refused(access, None).headers()["WWW-Authenticate"] == "Bearer"


def test_an_expired_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    _, secret = add(path, capsys, "--days", "1")
    access = Access(str(path))
    access.caller(f"Bearer {secret}", "", "generate")
    text = json.loads(path.read_text())
    text["keys"][0]["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    path.write_text(json.dumps(text))
    os.utime(path, ns=(1, 1))
    assert refused(access, secret).code == "expired_api_key"


def test_a_key_has_its_own_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    _, slow = add(path, capsys, "--requests-per-minute", "6")
    _, other = add(path, capsys)
    access = Access(str(path), clock)
    access.caller(f"Bearer {slow}", "", "generate")
    early = refused(access, slow)
    assert (early.status, early.code, early.retry_after_s) == (429, "rate_limit_exceeded", 10)
    access.caller(f"Bearer {other}", "", "generate")
    clock.now = 10
    access.caller(f"Bearer {slow}", "", "generate")
    clock.now = 1_000  # what was not used for long is not saved up
    access.caller(f"Bearer {slow}", "", "generate")
    assert refused(access, slow).status == 429


def test_the_kiosk_and_the_open_house(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    _, secret = add(path, capsys, "--scopes", "generate,kiosk")
    assert Access(str(path)).caller(f"bearer {secret}", "", "generate").kiosk
    visitor = Access("").caller(None, "1.2.3.4", "metrics")
    assert (visitor.id, visitor.kiosk) == ("1.2.3.4", False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"keys": [{"id": 1}]}',
        '{"keys": [{"id":"a","name":"a","sha256":"a","scopes":["x"],"expires":"soon"}]}',
        '{"keys": [{"id":"a","name":"a","sha256":"a","scopes":["x"],"requests_per_minute":0}]}',
        '{"keys": [{"id":"a","name":"a","sha256":"a","scopes":["x"],"requests_per_minute":"60"}]}',
    ],
)
def test_a_file_that_is_none_of_ours_stops_the_server_from_starting(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no file of API keys"):
        Access(str(path))
    assert keys.main(["list", str(path)]) == 2


def test_wrong_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys.json")
    assert keys.main(["add", path, "--name", "x", "--scopes", "paint"]) == 2
    assert keys.main(["add", path, "--name", "x", "--requests-per-minute", "0"]) == 2
    assert keys.main(["revoke", path, "nobody"]) == 2
    assert "holds no key nobody" in capsys.readouterr().err
