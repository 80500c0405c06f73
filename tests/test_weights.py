"""A model's name becomes a place, and its weights a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from momalisa import weights
from momalisa.weights import identity, locate, short_id


def test_the_miniature_travels_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MINIATURE", tmp_path)
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "blip").mkdir()
    (tmp_path / "training.json").write_text("{}")
    assert locate("miniature://diffusion") == str(tmp_path / "diffusion")
    with pytest.raises(ValueError, match=r"'miniature://dall-e' is not one of miniature://blip, miniature://diffusion$"):
        locate("miniature://dall-e")


def test_a_folder_is_itself_and_a_hub_name_too(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == str(tmp_path)
    assert locate("CompVis/stable-diffusion-v1-4") == "CompVis/stable-diffusion-v1-4"


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "../absent", "~/absent", "one", "a/b/c", "gs://bucket/model"])
def test_what_looks_like_a_path_must_be_there(name: str) -> None:
    with pytest.raises(ValueError, match="neither a folder here nor a hub name"):
        locate(name)


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name.replace("_", ".")).write_bytes(data)
    return path


def test_identity_is_a_folders_content(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", unet_safetensors=b"1", config_json=b"{}")
    copy = folder(tmp_path / "copy", unet_safetensors=b"1", config_json=b"{}", README_md=b"hello")
    other = folder(tmp_path / "other", unet_safetensors=b"2", config_json=b"{}")
    renamed = folder(tmp_path / "renamed", vae_safetensors=b"1", config_json=b"{}")
    assert identity(str(first)) == identity(str(copy))
    assert len({identity(str(place)) for place in (first, other, renamed)}) == 3


def test_identity_of_a_hub_name_is_its_revision() -> None:
    assert identity("CompVis/stable-diffusion-v1-4") == "CompVis/stable-diffusion-v1-4@main"
    assert identity("CompVis/stable-diffusion-v1-4", "abc") == "CompVis/stable-diffusion-v1-4@abc"


def test_short_id_tells_parts_apart() -> None:
    assert short_id("a", 1) == short_id("a", 1)
    assert len({short_id("a", 1), short_id("a", "1"), short_id("a1"), short_id(("a", 1))}) == 4
    assert all(len(short_id(part)) == 12 for part in range(9))
