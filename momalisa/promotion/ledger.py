"""Which checkpoint hangs in the hall, and how it came there: `refs/best` and a log that is only ever added to.

    <root>/promotions/<number>-<hash>.json    one promotion, never changed
    <root>/refs/best                          the checkpoint, its scores, and which entry of the log put it there

An entry names the one before it, so that the log is the chain that ends at `refs/best`. Of two promotions at once both write
an entry, and one moves the pointer; the other's entry is not part of the chain, and its author is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from momalisa.checkpoint import BEST, Checkpoint, read, verify
from momalisa.checkpoint.retention import LOG
from momalisa.storage import Pointer, StorageError, Store, canonical_json

Kind = Literal["evidence", "hand", "rollback"]
Entry = dict[str, Any]


class Overtaken(ValueError):
    """Another promotion was first; the message says which."""


def promote(
    store: Store,
    checkpoint: Checkpoint,
    kind: Kind,
    seen: Pointer,
    scores: dict[str, Any],
    evidence: str | None,
    reason: str = "",
) -> dict[str, Any]:
    """Add an entry and move `refs/best`, if it is still what was `seen`; returns what it says. Whoever only looks on (W&B) is
    told after this write.

    Every file of the checkpoint is compared with its hash first. Raises ValueError where one is not right, and Overtaken.
    """
    verify(store, checkpoint)
    last = _entry(store, seen)
    same = last is not None and last["checkpoint"] == checkpoint.path  # the same again is no step that one could take back
    undo = last["undo"] if last and same else (seen.value or {}).get("entry")
    return _append(store, checkpoint, seen, {"kind": kind, "reason": reason, "undo": undo}, scores, evidence)


def rollback(store: Store) -> dict[str, Any]:
    """Promote what was promoted before; again, and it is what was before that. One that is not whole any more is passed over and
    said. Raises ValueError where nothing was."""
    seen = store.read_pointer(BEST)
    current = _entry(store, seen)
    undo = current["undo"] if current else None
    while current is not None and undo is not None:
        earlier = store.read_json(undo)
        undo = earlier["undo"]
        try:
            checkpoint = read(store, earlier["checkpoint"])
            verify(store, checkpoint)
        except StorageError:
            raise
        except ValueError as error:
            print(f"promote: {earlier['name']} is passed over: {error}", flush=True)
            continue
        about = {"kind": "rollback", "reason": f"back from {current['name']}", "undo": undo}
        return _append(store, checkpoint, seen, about, earlier["scores"], seen.value.get("evidence"))
    raise ValueError(f"{store.url(BEST)}: nothing was promoted before that one could go back to")


def _append(
    store: Store, checkpoint: Checkpoint, seen: Pointer, about: Entry, scores: dict[str, Any], evidence: str | None
) -> dict[str, Any]:
    last = _entry(store, seen)
    entry = {
        **about,
        "number": last["number"] + 1 if last else 1,
        "parent": seen.value.get("entry") if seen.value else None,
        "checkpoint": checkpoint.path,
        "name": checkpoint.name,
        "scores": scores,
        "evidence": evidence,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    name = hashlib.sha256(canonical_json(entry)).hexdigest()[:16]
    path = f"{LOG}/{entry['number']:06d}-{name}.json"
    store.write_json(path, entry)
    pointer = {"checkpoint": checkpoint.path, "entry": path, "evidence": evidence, "scores": scores, "base": checkpoint.base}
    if not store.move_pointer(BEST, pointer, seen):
        winner = store.read_json(BEST)
        raise Overtaken(f"{store.url(BEST)} was moved to {winner['checkpoint']} meanwhile; look at it, then promote again")
    return pointer


def _entry(store: Store, pointer: Pointer) -> Entry | None:
    """The entry behind a pointer; None where there is none (a pointer that an earlier version wrote)."""
    path = pointer.value.get("entry") if pointer.value else None
    return dict(store.read_json(path)) if path else None


def log(store: Store) -> Iterator[Entry]:
    """Every promotion, the newest first."""
    entry = _entry(store, store.read_pointer(BEST))
    while entry is not None:
        yield entry
        entry = dict(store.read_json(entry["parent"])) if entry["parent"] else None


def line(entry: Entry) -> str:
    """`3  2026-01-02T03:04:05+00:00  evidence  demo-1@6400  loss 0.04 (base 0.05)  why`"""
    loss, base = (entry["scores"].get(f"heldout_loss_{which}") for which in ("best", "base"))
    measured = f"loss {loss:.5f} (base {base:.5f})" if loss is not None and base is not None else "not measured"
    return f"{entry['number']:4}  {entry['at']}  {entry['kind']:8}  {entry['name']}  {measured}  {entry['reason']}"
