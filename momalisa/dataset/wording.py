"""Latents carry the words that training reads beside them: when the words change, the tables do, and no picture is encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from momalisa.dataset import Dataset

Tokenize = Callable[[Sequence[str]], Any]  # N texts -> token ids [N, L], with `tolist`


def reworded(
    dataset: Dataset, folder: str, paths: Iterable[str], texts: dict[str, str], tokenize: Tokenize
) -> tuple[tuple[str, ...], int]:
    """Latents tables in which every row has its work's present text: (tables, rows whose text is another now).

    A table that needs no change is named as it is; another is written anew beside it, its moments as they were. A row
    whose work has no text any more is left out. So the tables equal those of an encoding that began with these texts.
    """
    new, changed = [], 0
    for path, table in dataset.small_tables(paths, ["id", "caption"]):
        stale = [row["id"] for row in table.to_pylist() if texts.get(row["id"]) != row["caption"]]
        changed += sum(id in texts for id in stale)
        if not stale:
            new.append(path)
        elif (anew := _reworded(dataset.store.get_table(path), texts, tokenize)).num_rows:
            new.append(dataset.store.put_table(folder, anew))
    return tuple(new), changed


def _reworded(table: pa.Table, texts: dict[str, str], tokenize: Tokenize) -> pa.Table:
    kept = Dataset.without(table, set(table["id"].to_pylist()) - texts.keys())
    rows = kept.select(["id", "caption", "token_ids", "status"]).to_pylist()
    stale = [row for row in rows if texts[row["id"]] != row["caption"]]
    tokens = tokenize([texts[row["id"]] for row in stale]).tolist() if stale else []
    for row, token_ids in zip(stale, tokens, strict=True):
        row["caption"] = texts[row["id"]]
        row["token_ids"] = token_ids if row["token_ids"] else []  # none where the picture could not be encoded
    for name in ("caption", "token_ids"):
        place = kept.schema.get_field_index(name)
        values = pa.array([row[name] for row in rows], kept.schema.field(name).type)
        kept = kept.set_column(place, kept.schema.field(name), values)
    return kept
