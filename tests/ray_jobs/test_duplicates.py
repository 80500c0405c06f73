"""What is there twice is collected once more, said, and passed by from then on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from momalisa.captioner import captioner_id
from momalisa.config import Collect, Settings, Source
from momalisa.dataset import Dataset
from momalisa.miniature import draw
from momalisa.records import DUPLICATES, OK
from ray_jobs import caption, collect
from ray_jobs._tables import open_parts


def marked(id: str, original: str) -> dict[str, Any]:
    return {"id": id, "duplicate_of": original, "kind": "near", "distance": 2, "correlation": 0.99}


def publish(dataset: Dataset, rows: list[dict[str, Any]]) -> None:
    path = dataset.put_rows("duplicates", rows, DUPLICATES)
    dataset.publish(replace(dataset.latest(), duplicates=(path,)))


def test_parts_leave_out_what_is_excluded(collection: Dataset) -> None:
    images = collection.latest().images
    parts, total = open_parts(collection, images, set(), None, {"w20", "w21", "w00"})
    assert total == 5
    assert all("w2" not in part["wanted"] and "w00" not in part["wanted"] for part in parts)
    assert len(parts) == 2  # the third table has nothing else
    assert open_parts(collection, images, {"w01"}, None, {"w01"})[1] == 7


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_a_duplicate_gets_no_caption_and_one_captioned_before_is_not_counted(settings: Settings, collection: Dataset) -> None:
    publish(collection, [marked("w12", "w00")])  # the picture that is none
    first = caption.run(settings)
    assert (first["rows_in"], first["rows_out"], first["rejected"], first["duplicates"]) == (7, 7, 0, 1)
    rows = collection.rows(collection.latest().captions[captioner_id(settings)], ["id"])
    assert {row["id"] for row in rows} == {"w00", "w01", "w02", "w10", "w11", "w20", "w21"}
    publish(collection, [marked("w12", "w00"), marked("w01", "w02")])
    again = caption.run(settings)
    assert (again["rows_in"], again["rows_out"], again["new"], again["duplicates"]) == (6, 6, 0, 2)


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_a_copy_is_collected_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "artworks"
    folder.mkdir()
    for number in range(3):
        draw.draw(draw.all_scenes()[number * 100], seed=0).resize((400, 400)).save(folder / f"{number}.png")
    Image.open(folder / "1.png").resize((200, 200)).save(folder / "small.jpg", quality=70)
    (folder / "twin.png").write_bytes((folder / "2.png").read_bytes())
    chosen = Collect(source=Source(kind="folder", location=str(folder)), block_size=2)
    settings = Settings(root=str(tmp_path / "root")).model_copy(update={"collect": chosen, "ray_cpus_per_task": 0.5})
    summary = collect.run(settings)
    assert (summary["rows_out"], summary["duplicates"]) == (5, 2)
    dataset = Dataset(settings.dataset)
    version = dataset.latest()
    titles = {row["id"]: Path(row["image_url"]).name for row in dataset.rows(version.images) if row["status"] == OK}
    rows = {titles[row["id"]]: (titles[row["duplicate_of"]], row["kind"]) for row in dataset.rows(version.duplicates)}
    assert rows["small.jpg"] == ("1.png", "near")
    assert set(rows) == {"small.jpg", *rows.keys() & {"twin.png", "2.png"}}
    assert sorted(kind for _, kind in rows.values()) == ["exact", "near"]
    keeping = settings.model_copy(update={"collect": chosen.model_copy(update={"duplicates": "keep"})})
    assert collect.run(keeping)["duplicates"] == 0
    assert dataset.latest().duplicates == ()
    assert collect.run(settings)["duplicates"] == 2
    assert dataset.latest() == version
