"""Old weights go, but for what anybody points to; strangers are passed over."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import BEST, Checkpoint, NoCheckpoint
from momalisa.checkpoint.card import card
from momalisa.checkpoint.retention import retain
from momalisa.promotion.decision import Evidence
from momalisa.storage import Store

BASE = {"model": "CompVis/stable-diffusion-v1-4", "revision": None, "variant": None}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Six checkpoints, at 10 to 60 images, with states."""
    made = Store(str(tmp_path / "store"))
    for name in ("weights", "state"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text("{}")
    for images in range(10, 70, 10):
        entry = Checkpoint(path(images), "run", images, BASE, {})
        checkpoints.write(made, entry, tmp_path / "weights", tmp_path / "state")
    return made


def path(images: int) -> str:
    return f"checkpoints/run/{images:09d}"


def left(store: Store) -> list[int]:
    return [found.images_seen for found in checkpoints.read_all(store, "run")]


def test_by_default_all_weights_stay_and_the_newest_states(store: Store) -> None:
    assert retain(store, "run", keep_states=2, keep_weights=None) == []
    assert left(store) == [10, 20, 30, 40, 50, 60]
    assert [found.images_seen for found in checkpoints.read_all(store, "run") if found.state] == [50, 60]
    assert store.list(f"{path(10)}/state") == []


def test_the_newest_stay_and_what_is_named(store: Store) -> None:
    store.write_json(BEST, {"checkpoint": path(20)})
    store.write_json("promotions/000001-x.json", {"checkpoint": path(30)})
    store.write_bytes("refs/broken", b"{")
    for images, loss in ((10, 0.1), (40, 0.5)):
        store.write_json(f"evaluations/run/{images:09d}/x/losses.json", {"checkpoint": path(images), "held_out": [loss, loss]})
    for path_ in (None, "checkpoints/run-ema0.100/000000060"):  # of the base, and of an average: better, but not this run's
        name = str(path_).replace("/", "-")
        store.write_json(f"evaluations/run/{name}/x/losses.json", {"checkpoint": path_, "held_out": [0.01]})
    gone = retain(store, "run", keep_states=1, keep_weights=1)
    assert [found.images_seen for found in gone] == [40, 50]
    assert left(store) == [10, 20, 30, 60]
    assert store.list(path(40)) == []


def test_states_are_not_lost_with_weights(store: Store) -> None:
    retain(store, "run", keep_states=3, keep_weights=1)
    assert left(store) == [40, 50, 60]


def test_a_checkpoint_is_gone_before_its_files_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    delete, deleted = store.delete, []

    def killed(name: str) -> None:
        if deleted:
            raise KeyboardInterrupt
        deleted.append(name)
        delete(name)

    retain(store, "run", keep_states=1, keep_weights=None)
    monkeypatch.setattr(store, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        retain(store, "run", keep_states=1, keep_weights=5)
    assert deleted == [f"{path(10)}/manifest.json"]
    monkeypatch.undo()
    assert left(store) == [20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "someone/2"}, "format is not 'momalisa/1'"),
        ({"files": None}, "its manifest names no weights"),
        ({"files": {"../../refs/best": "0" * 64}}, r"names '\.\./\.\./refs/best'"),
        ({"files": {"/etc/passwd": "0" * 64}}, "names '/etc/passwd'"),
        ({"path": "checkpoints/other/000000010"}, "belongs to checkpoints/other"),
        ({"wings": 2}, r"other fields \(wings\)"),
        ({"files": 3}, "its manifest's files is something else"),
        ({"files": {"": "0" * 64}}, "names ''"),
        ({"state": "null"}, "its manifest's state is something else"),
        ({"images_seen": "many"}, "its manifest's images_seen is something else"),
        ({"base": []}, "its manifest's base is something else"),
        ({"base": {"model": 3}}, "its manifest's model is something else"),
        ({"training": {"losses": 3}}, "its manifest's losses is something else"),
        ({"training": {"average": {}, "losses": []}}, "its manifest's average.sigma_rel is something else"),
    ],
)
def test_a_stranger_is_passed_over_and_said(
    store: Store, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = {**store.read_json(f"{path(10)}/manifest.json"), **change}
    store.write_json(f"{path(10)}/manifest.json", {key: value if value is not None else {} for key, value in manifest.items()})
    with pytest.raises(NoCheckpoint, match=said):
        checkpoints.read(store, path(10))
    assert left(store) == [20, 30, 40, 50, 60]
    assert "passed over" in capsys.readouterr().out


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = [entry.name for entry in fields(Checkpoint)]
OF_TRAINING = ["losses", "settings", "average", "dataset", "stopped"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(name="base", part=None, value={})
@given(name=st.sampled_from(NAMES), part=st.sampled_from([None, *OF_TRAINING, "model", "revision"]), value=ANYTHING)
def test_whatever_a_manifest_holds_it_is_a_checkpoint_or_passed_over(name: str, part: str | None, value: Any) -> None:
    """One value of it, or of one of its dictionaries, may be any JSON: nobody who reads stumbles, and the others are found."""
    made = Store(f"memory://{uuid.uuid4().hex}")
    whole = {**asdict(Checkpoint(path(10), "run", 10, BASE, {"a": "0"})), "training": {"losses": [[10, 0.5]]}}
    made.write_json(f"{path(20)}/manifest.json", {**whole, "path": path(20), "images_seen": 20})
    old = whole[name]
    changed = {**old, part: value} if part and isinstance(old, dict) else value
    made.write_bytes(f"{path(10)}/manifest.json", json.dumps({**whole, name: changed}).encode())
    found = checkpoints.read_all(made, "run")
    assert path(20) in {one.path for one in found}
    for one in found:
        assert one.name == f"{one.run}@{one.images_seen}"
        assert isinstance(one.diffusion.model, str)
        assert isinstance(one.zero_terminal_snr, bool)
        assert isinstance(Evidence(one, np.zeros(1)).length, float | None)
        assert all(len(pair) == 2 for pair in one.training.get("losses", []))
        assert card(asdict(one))
    retain(made, "run", keep_states=1, keep_weights=1)


@pytest.mark.parametrize("data", [b"", b'{"path": "chec', b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_truncated_manifest_is_no_checkpoint(store: Store, data: bytes) -> None:
    store.write_bytes(f"{path(10)}/manifest.json", data)
    store.write_json(BEST, {"checkpoint": path(10)})
    with pytest.raises(NoCheckpoint, match="000000010"):
        checkpoints.read_best(store)
    assert left(store) == [20, 30, 40, 50, 60]
