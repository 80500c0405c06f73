"""A checkpoint is whole or it does not exist, and what is loaded is what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import BEST, LORA_FILE, Checkpoint, NoCheckpoint
from momalisa.config import Diffusion, Train
from momalisa.storage import Store
from momalisa.training.model import trainable


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def diffusion(tiny_base: Path) -> Diffusion:
    return Diffusion(model=str(tiny_base))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    return tmp_path / "weights"


def entry(images_seen: int, run: str = "demo-1", **fields: Any) -> Checkpoint:
    base = {"model": "CompVis/stable-diffusion-v1-4", "revision": None, "variant": None}
    return Checkpoint(f"checkpoints/{run}/{images_seen:09d}", run, images_seen, base, files={}, **fields)


def predict(unet: Any) -> torch.Tensor:
    source = torch.Generator().manual_seed(3)
    latents, text = torch.randn((2, 4, 8, 8), generator=source), torch.randn((2, 77, 32), generator=source)
    with torch.no_grad():
        found: torch.Tensor = unet(latents, torch.tensor([3, 700]), text).sample
    return found


def test_what_is_written_is_read(store: Store, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "progress.json").write_text("{}")
    complete = checkpoints.write(store, entry(5, training={"losses": [[5, 0.5]]}), folder, tmp_path / "state")
    assert list(complete.files) == ["config.json"]
    assert list(complete.state) == ["progress.json"]
    assert checkpoints.read(store, complete.path) == complete
    assert (complete.id, complete.diffusion.model) == ("demo-1-5", "CompVis/stable-diffusion-v1-4")


def test_without_a_manifest_there_is_no_checkpoint(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = store.write_bytes

    def killed(path: str, data: bytes) -> None:
        if path.endswith("manifest.json"):
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(store, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(store, entry(5), folder)
    monkeypatch.undo()
    assert store.exists(f"{entry(5).path}/weights/config.json")
    assert checkpoints.read_all(store, "demo-1") == []
    with pytest.raises(NoCheckpoint, match=f"{store.root}/{entry(5).path} holds no complete checkpoint"):
        checkpoints.read(store, entry(5).path)


def test_read_all_is_one_run_in_order_of_images_seen(store: Store, folder: Path) -> None:
    for checkpoint in (entry(1_500_000_000), entry(20), entry(7), entry(9, run="demo-12")):
        checkpoints.write(store, checkpoint, folder)
    assert [found.images_seen for found in checkpoints.read_all(store, "demo-1")] == [7, 20, 1_500_000_000]
    assert checkpoints.read_all(store, "absent") == []


def test_best_is_what_the_pointer_says(store: Store, folder: Path) -> None:
    with pytest.raises(NoCheckpoint, match=f"{store.root}/refs/best does not exist: run the promote job first"):
        checkpoints.read_best(store)
    for images in (5, 10):
        checkpoints.write(store, entry(images), folder)
    store.write_json(BEST, {"checkpoint": entry(5).path})
    assert checkpoints.read_best(store).images_seen == 5
    store.write_json(BEST, {"checkpoint": entry(99).path})
    with pytest.raises(NoCheckpoint, match="000000099 holds no complete checkpoint"):
        checkpoints.read_best(store)


def test_a_whole_unet_comes_back_bit_by_bit(store: Store, diffusion: Diffusion, tmp_path: Path) -> None:
    unet = checkpoints.load_base_unet(diffusion)
    with torch.no_grad():
        for value in unet.parameters():
            value.add_(0.01)
    checkpoints.save_weights(unet, tmp_path / "weights", lora=False)
    saved = checkpoints.write(store, replace(entry(5), base=diffusion.model_dump()), tmp_path / "weights")
    loaded = checkpoints.load_unet(store, saved)
    assert not loaded.training
    assert torch.equal(predict(loaded), predict(unet.eval()))
    assert checkpoints.load_unet(store, saved, torch.bfloat16).dtype == torch.bfloat16


def test_a_lora_checkpoint_loads_fused_and_equals_base_plus_adapter(store: Store, diffusion: Diffusion, tmp_path: Path) -> None:
    unet = checkpoints.load_base_unet(diffusion)
    plain = predict(unet)
    adapters = trainable(unet, Train(lora_rank=2))
    torch.testing.assert_close(predict(unet), plain)  # a new adapter changes nothing
    with torch.no_grad():
        for value in adapters.values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    adapted = predict(unet)
    assert float((adapted - plain).abs().max()) > 0.01
    checkpoints.save_weights(unet, tmp_path / "weights", lora=True)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [LORA_FILE]
    saved = checkpoints.write(store, replace(entry(5), base=diffusion.model_dump(), lora=True), tmp_path / "weights")
    loaded = checkpoints.load_unet(store, saved)
    torch.testing.assert_close(predict(loaded), adapted, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name]
    assert set(loaded.state_dict()) == set(checkpoints.load_base_unet(diffusion).state_dict())


@pytest.mark.parametrize("lora", [False, True])
def test_a_corrupted_file_is_named_and_never_loaded(store: Store, diffusion: Diffusion, tmp_path: Path, lora: bool) -> None:
    unet = checkpoints.load_base_unet(diffusion)
    if lora:
        trainable(unet, Train(lora_rank=2))
    checkpoints.save_weights(unet, tmp_path / "weights", lora=lora)
    saved = checkpoints.write(store, replace(entry(5), base=diffusion.model_dump(), lora=lora), tmp_path / "weights")
    name = LORA_FILE if lora else "diffusion_pytorch_model.safetensors"
    data = bytearray(store.read_bytes(f"{saved.path}/weights/{name}"))
    data[-1] ^= 1
    store.write_bytes(f"{saved.path}/weights/{name}", bytes(data))
    with pytest.raises(ValueError, match=rf"{saved.path}/weights/{name} has sha256 .* its manifest says"):
        checkpoints.load_unet(store, saved)
