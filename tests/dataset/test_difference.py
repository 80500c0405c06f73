"""Two versions: what was added, removed, changed; for people, for programs, and quickly."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from momalisa.dataset import Dataset, Version
from momalisa.dataset.difference import as_json, as_text, difference
from momalisa.dataset.edits import with_edits
from momalisa.records import CAPTIONS, IMAGES
from tests.dataset.conftest import BLIP, caption, work


def test_a_version_does_not_differ_from_itself(collection: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    version = collection.latest()
    monkeypatch.setattr(collection.store, "get_columns", lambda *_: pytest.fail("a table was read"))
    assert difference(collection, version, version) == {}
    assert as_text({}, 20) == "no difference in works, captions or edits"


def test_works_captions_and_edits(dataset: Dataset) -> None:
    def images(*works: object) -> tuple[str, ...]:
        return (dataset.put_rows("images", [one.row() for one in works], IMAGES),)  # type: ignore[attr-defined]

    shared = dataset.put_rows("images", [work(9).row()], IMAGES)
    words = {text: dataset.put_rows(f"captions/{BLIP}", [caption("w0"), caption("w1", text)], CAPTIONS) for text in ("x", "y")}
    old = Version(images=(shared, *images(work(0), work(1), work(2))), captions={BLIP: (words["x"],)}, latents={"vae": ("l",)})
    new = Version(images=(shared, *images(work(0), work(1, title="Ñew"), work(3))), captions={BLIP: (words["y"],)})
    new = with_edits(dataset, new, {"w0": "mine"})
    found = difference(dataset, old, new)
    assert as_json(found) == {
        f"captions/{BLIP}": {"added": [], "removed": [], "changed": {"w1": {"short": ["x", "y"]}}},
        "edits": {"added": ["w0"], "removed": [], "changed": {}},
        "images": {"added": ["w3"], "removed": ["w2"], "changed": {"w1": {"title": ["Work 1", "Ñew"]}}},
    }
    assert json.loads(json.dumps(as_json(found)))
    text = as_text(found, 20)
    assert "images: 1 added, 1 removed, 1 changed\n  + w3\n  - w2\n  ~ w1  title: 'Work 1' -> 'Ñew'" in text
    assert f"captions/{BLIP}: 0 added, 0 removed, 1 changed\n  ~ w1  short: 'x' -> 'y'" in text
    backwards = difference(dataset, new, old)
    assert backwards["images"].added == found["images"].removed
    assert backwards["images"].changed == {"w1": {"title": ["Ñew", "Work 1"]}}


def test_works_that_only_moved_to_another_table_have_not_changed(dataset: Dataset) -> None:
    one = [dataset.put_rows("images", [work(n).row()], IMAGES) for n in range(2)]
    both = dataset.put_rows("images", [work(n).row() for n in range(2)], IMAGES)
    assert difference(dataset, Version(images=tuple(one)), Version(images=(both,))) == {}


def test_long_lists_are_cut(dataset: Dataset) -> None:
    path = dataset.put_rows("images", [work(0, id=f"w{n:02}").row() for n in range(30)], IMAGES)
    text = as_text(difference(dataset, Version(), Version(images=(path,))), 5)
    assert text.splitlines()[-1] == "  ... and 25 more (--limit)"
    assert len(text.splitlines()) == 7


def test_two_versions_of_10_000_rows_are_compared_in_under_a_second(dataset: Dataset) -> None:
    def version(title: str) -> Version:
        works = [{**work(0).row(), "id": f"w{n:05}", "title": title} for n in range(10_000)]
        captions = [caption(row["id"], f"{title} {row['id']}") for row in works]
        starts = range(0, 10_000, 500)
        images = tuple(dataset.put_rows("images", works[n : n + 500], IMAGES) for n in starts)
        tables = tuple(dataset.put_rows(f"captions/{BLIP}", captions[n : n + 500], CAPTIONS) for n in starts)
        return Version(images=images, captions={BLIP: tables})

    old, new = version("old"), version("new")
    began = time.process_time()
    found = difference(dataset, old, new)
    assert time.process_time() - began < 1  # every row of both versions differs; of the CPU, for the machine may be busy
    assert len(found["images"].changed) == len(found[f"captions/{BLIP}"].changed) == 10_000
    began = time.process_time()
    assert not difference(dataset, new, replace(new, latents={"vae": ()}))
    assert time.process_time() - began < 0.1
