"""Every captioned picture is encoded once, with its own caption, as the library alone encodes it."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from momalisa import family as families
from momalisa.buckets import Bucketed
from momalisa.captioner import captioner_id
from momalisa.config import Diffusion, Settings
from momalisa.dataset import Dataset
from momalisa.dataset.edits import with_edits
from momalisa.latents import Autoencoder, TextEncoder, encoder_id, frame, from_bytes, load_tokenizer, to_pixels, tokenize
from momalisa.records import CAPTIONS, IMAGES, LATENTS, MIRRORED_LATENTS, Artwork
from momalisa.storage import parquet_bytes
from ray_jobs import encode


@pytest.fixture
def captioned(settings: Settings, collection: Dataset) -> Dataset:
    """The collection with a caption for each picture but `w12` (an error) and `w21` (none yet)."""
    rows = [
        {
            "id": id, "short": "" if id == "w12" else f"caption of {id}", "long": "", "fused": f"caption of {id}, by X",
            "status": "error" if id == "w12" else "ok", "error": "",
        }
        for id in ("w00", "w01", "w02", "w10", "w11", "w12", "w20")
    ]  # fmt: skip
    name = captioner_id(settings)
    path = collection.put_rows(f"captions/{name}", rows, CAPTIONS)
    collection.publish(collection.latest().with_captions(name, [path]))
    return collection


def mirrored(settings: Settings) -> Settings:
    return settings.model_copy(update={"encode": settings.encode.model_copy(update={"mirrored": True})})


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_captioned_pictures_are_encoded_once_whatever_the_pool(
    settings: Settings, captioned: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    before = captioned.latest()
    summary = encode.run(settings)
    speed = summary.pop("pictures_per_s")
    assert 0 < summary["rows_per_s"] < speed["one_decoder"]
    assert summary["rows_per_s"] < speed["one_actor"]
    assert summary | {"seconds": 0, "rows_per_s": 0} == {
        "stage": "encode", "rows_in": 6, "rows_out": 6, "rejected": 0, "new": 6, "skipped": 0,
        "duplicates": 0, "seconds": 0, "rows_per_s": 0,
    }  # fmt: skip
    published = captioned.latest()
    name = encoder_id(settings, captioner_id(settings))
    rows = {row["id"]: row for row in captioned.rows(published.latents[name])}
    assert sorted(rows) == ["w00", "w01", "w02", "w10", "w11", "w20"]

    works = {row["id"]: row["bytes"] for row in captioned.rows(before.images)}
    autoencoder, text_encoder = Autoencoder.load(settings.diffusion), TextEncoder.load(settings.diffusion)
    for id, row in rows.items():
        assert (row["channels"], row["height"], row["width"], row["status"]) == (4, 8, 8, "ok")
        moments = np.frombuffer(row["moments"], "<f2").reshape(8, 8, 8)
        expected = autoencoder.encode(to_pixels(Image.open(io.BytesIO(works[id])), 64)[None])[0]
        np.testing.assert_allclose(moments, expected.numpy(), rtol=2e-3, atol=2e-3)
        assert row["caption"] == f"caption of {id}"
        assert row["token_ids"] == text_encoder.tokenize([row["caption"]])[0].tolist()

    again = encode.run(settings)
    assert (again["new"], again["skipped"], again["rows_out"]) == (0, 6, 6)
    assert "encode: nothing new (6 works)" in capsys.readouterr().out
    assert captioned.latest() == published

    captioned.publish(before)  # the same from the start, by two actors, is the same version
    encode.run(settings.model_copy(update={"encode": settings.encode.model_copy(update={"actors": 2})}))
    assert captioned.latest().sha256 == published.sha256


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_a_curators_words_take_the_captions_place_without_encoding_a_picture(
    settings: Settings, captioned: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = mirrored(settings)
    encode.run(settings)
    name = encoder_id(settings, captioner_id(settings))
    before = captioned.latest()
    edits = {"w00": "A MOMA artwork of: a boat", "w21": "A MOMA artwork of: what no captioner described"}
    captioned.update(lambda latest: with_edits(captioned, latest, edits))
    summary = encode.run(settings)
    assert (summary["new"], summary["skipped"], summary["rows_out"]) == (2, 5, 7)
    old, new = ({row["id"]: row for row in captioned.rows(version.latents[name])} for version in (before, captioned.latest()))
    assert sorted(new) == sorted([*old, "w21"])
    tokenizer = load_tokenizer(settings.diffusion)
    for id, text in edits.items():
        assert (new[id]["caption"], new[id]["token_ids"]) == (text, tokenize(tokenizer, [text])[0].tolist())
    assert new["w00"]["moments"] == old["w00"]["moments"] != old["w00"]["mirrored"]
    assert new["w00"]["mirrored"] == old["w00"]["mirrored"]
    assert {id: row for id, row in new.items() if id not in edits} == {id: row for id, row in old.items() if id != "w00"}
    assert before.latents[name] != captioned.latest().latents[name]
    assert not captioned.store.missing(before.paths())

    edited = captioned.latest()
    monkeypatch.setattr("ray_jobs._cluster.connect", lambda: pytest.fail("Ray was started"))
    assert encode.run(settings)["new"] == 0
    assert captioned.latest() == edited
    captioned.update(lambda latest: with_edits(captioned, latest, edits | {"w01": "only words changed"}))
    assert encode.run(settings)["new"] == 1  # without a picture to encode there is no need of Ray


@pytest.mark.usefixtures("collection")
def test_without_captions_the_job_before_is_named(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"holds no captions by .*: run the caption job first"):
        encode.run(settings)


def test_without_pictures_the_first_job_is_named(settings: Settings) -> None:
    with pytest.raises(ValueError, match="run the collect job first"):
        encode.run(settings)


@pytest.mark.usefixtures("captioned")
def test_a_wrong_model_fails_before_ray_starts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs._cluster.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match="neither a folder here nor a hub name"):
        encode.run(settings.model_copy(update={"diffusion": Diffusion(model="./nothing")}))


def test_latents_are_made_in_full_precision(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    encode.load(settings, "cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_latents_that_are_not_finite_are_an_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encode.load(settings, "cpu")
    moments = torch.zeros(2, 8, 8, 8, dtype=torch.float16)
    moments[0, 3, 4, 5] = float("nan")
    monkeypatch.setattr(Autoencoder, "encode", lambda self, pixels: moments)
    works = [{"id": "x", "text": "one"}, {"id": "y", "text": "two"}]
    first, second = model.rows(works, [np.zeros((2, 64, 64, 3), dtype=np.uint8)])
    assert (first["id"], first["status"], first["error"]) == ("x", "error", "its latents are not finite")
    assert (first["moments"], first["token_ids"]) == (b"", [])
    assert (second["id"], second["status"], len(second["moments"])) == ("y", "ok", 2 * 8 * 8 * 8)


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_fused_captions_are_trained_on_where_chosen(settings: Settings, captioned: Dataset) -> None:
    fused = settings.model_copy(update={"encode": settings.encode.model_copy(update={"caption": "fused"})})
    encode.run(fused)
    known = captioned.latest().latents
    assert list(known) == [encoder_id(fused, captioner_id(fused))]
    assert encoder_id(settings, captioner_id(settings)) not in known
    rows = list(captioned.rows(next(iter(known.values()))))
    assert [row["caption"] for row in rows] == [f"caption of {row['id']}, by X" for row in rows]


@pytest.fixture
def bucketed(settings: Settings) -> Settings:
    return settings.model_copy(update={"encode": settings.encode.model_copy(update={"buckets": True})})


@pytest.fixture
def pictures() -> dict[str, Image.Image]:
    """Of three proportions."""
    noise = np.random.default_rng(3).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    return {"a": Image.fromarray(noise[:90]), "b": Image.fromarray(noise), "c": Image.fromarray(noise[:, :50])}


def encoded(chosen: Settings, pictures: dict[str, Image.Image], schema: pa.Schema = LATENTS) -> dict[str, dict[str, Any]]:
    """The rows of some pictures, by id."""
    works = []
    for id, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        works.append(Artwork(id=id, bytes=buffer.getvalue()).row())
    table = parquet_bytes(pa.Table.from_pylist(works, schema=IMAGES))
    model = encode.load(chosen, "cpu")
    family = families.Family("encode", chosen.encode, "x", schema, (frame(chosen.encode),), lambda device: model)
    part = {"wanted": json.dumps(dict.fromkeys(pictures, "a caption")), "data": table}
    made = families.fill(families.decode(part, family.squares, ()), family, model)
    return {row["id"]: row for row in pq.read_table(io.BytesIO(made["data"])).to_pylist()}


def test_with_buckets_each_picture_keeps_its_proportions(
    settings: Settings, bucketed: Settings, pictures: dict[str, Image.Image]
) -> None:
    assert encoder_id(settings, "blip") != encoder_id(bucketed, "blip")
    rows = encoded(bucketed, pictures)
    assert {id: (row["width"], row["height"]) for id, row in rows.items()} == {"a": (12, 5), "b": (8, 8), "c": (4, 16)}
    autoencoder = Autoencoder.load(settings.diffusion)
    for id, row in rows.items():
        pixels = from_bytes(torch.from_numpy(Bucketed(64, 8)(pictures[id]).copy())[None])
        moments = np.frombuffer(row["moments"], "<f2").reshape(8, row["height"], row["width"])
        np.testing.assert_allclose(moments, autoencoder.encode(pixels)[0].numpy(), rtol=2e-3, atol=2e-3)


def test_a_mirror_image_is_encoded_like_any_picture(bucketed: Settings, pictures: dict[str, Image.Image]) -> None:
    rows = encoded(mirrored(bucketed), pictures, MIRRORED_LATENTS)
    of_mirrors = encoded(bucketed, {id: ImageOps.mirror(picture) for id, picture in pictures.items()})
    for id, row in rows.items():
        found, expected = (np.frombuffer(values, "<f2") for values in (row.pop("mirrored"), of_mirrors[id]["moments"]))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    assert rows == encoded(bucketed, pictures)  # but for the column nothing is another


def test_a_mirror_image_that_cannot_be_encoded_is_an_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    model, moments = encode.load(mirrored(settings), "cpu"), torch.zeros(2, 1, 8, 8, 8, dtype=torch.float16)
    moments[1, 0, 3, 4, 5] = float("inf")
    sides = iter(moments)
    monkeypatch.setattr(Autoencoder, "encode", lambda self, pixels: next(sides))
    (row,) = model.rows([{"id": "x", "text": "one"}], [np.zeros((1, 64, 64, 3), dtype=np.uint8)])
    assert (row["status"], row["moments"], row["mirrored"]) == ("error", b"", b"")
