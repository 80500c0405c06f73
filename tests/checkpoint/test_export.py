"""What is exported, plain diffusers loads, and it draws what the checkpoint draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import BEST, LORA_FILE, Checkpoint
from momalisa.checkpoint.__main__ import main
from momalisa.checkpoint.export import export
from momalisa.config import Diffusion, Train
from momalisa.storage import Store
from momalisa.training.model import trainable


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def written(store: Store, base: Path, scratch: Path, lora: bool = False) -> Checkpoint:
    """A fine-tuned checkpoint of the tiny base at 64 images."""
    diffusion = Diffusion(model=str(base))
    unet = checkpoints.load_base_unet(diffusion)
    tuned = trainable(unet, Train(lora_rank=2)).values() if lora else unet.parameters()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in tuned:
            value.add_(torch.randn(value.shape, generator=source), alpha=0.2 if lora else 0.02)
    checkpoints.save_weights(unet, scratch / "weights", lora=lora)
    training = {"dataset": "d" * 64, "encoder_id": "e", "losses": [[32, 0.75], [64, 0.5]]}
    entry = Checkpoint("checkpoints/tiny-1/000000064", "tiny-1", 64, diffusion.model_dump(), {}, lora, training=training)
    return checkpoints.write(store, entry, scratch / "weights")


def predict(unet: Any) -> torch.Tensor:
    source = torch.Generator().manual_seed(3)
    latents, text = torch.randn((2, 4, 8, 8), generator=source), torch.randn((2, 77, 32), generator=source)
    with torch.no_grad():
        found: torch.Tensor = unet.eval()(latents, torch.tensor([3, 700]), text).sample
    return found


def test_a_whole_fine_tune_loads_in_plain_diffusers(store: Store, tiny_base: Path, tmp_path: Path) -> None:
    saved = written(store, tiny_base, tmp_path)
    folder = export(store, saved, tmp_path / "out" / "pipeline")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert torch.equal(predict(pipeline.unet), predict(checkpoints.load_unet(store, saved)))
    assert not torch.equal(predict(pipeline.unet), predict(checkpoints.load_base_unet(saved.diffusion)))
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("a boat", num_inference_steps=1, height=32, width=32).images
    assert picture.size == (32, 32)
    assert json.loads((folder / "momalisa.json").read_text())["images_seen"] == 64
    assert "tiny-1 at 64 images" in (folder / "README.md").read_text()


def test_adapters_load_by_load_lora_weights_or_fused_as_a_pipeline(store: Store, tiny_base: Path, tmp_path: Path) -> None:
    saved = written(store, tiny_base, tmp_path, lora=True)
    expected = predict(checkpoints.load_unet(store, saved))
    folder = export(store, saved, tmp_path / "lora")
    assert {path.name for path in folder.iterdir()} == {LORA_FILE, "README.md", "momalisa.json"}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.load_lora_weights(folder)
    torch.testing.assert_close(predict(pipeline.unet), expected, rtol=1e-4, atol=1e-5)
    fused = StableDiffusionPipeline.from_pretrained(export(store, saved, tmp_path / "fused", fuse=True))
    torch.testing.assert_close(predict(fused.unet), expected, rtol=1e-4, atol=1e-5)


def test_a_damaged_file_or_a_folder_that_is_there_leaves_nothing_behind(store: Store, tiny_base: Path, tmp_path: Path) -> None:
    saved = written(store, tiny_base, tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken is there already"):
        export(store, saved, tmp_path / "taken")
    store.write_bytes(f"{saved.path}/weights/config.json", b"{}")
    with pytest.raises(ValueError, match=r"config.json has sha256"):
        export(store, saved, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir() if "new" in path.name] == []


def test_the_commands(store: Store, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = written(store, tiny_base, tmp_path)
    root = ["--root", str(tmp_path / "store")]
    store.write_json(BEST, {"checkpoint": saved.path, "scores": {"heldout_loss_best": 0.125}})
    main(["list", *root])
    main(["verify", "tiny-1@64", *root])
    main(["export", "best", str(tmp_path / "out"), *root])
    said = capsys.readouterr().out
    assert "tiny-1@64\ntiny-1@64 is whole: 2 files\ntiny-1@64 is in " in said
    assert "| heldout loss best | 0.125 |" in (tmp_path / "out" / "README.md").read_text()
    store.delete(f"{saved.path}/weights/config.json")
    for wrong, message in (
        (["verify", "tiny-1@64"], "config.json does not exist"),
        (["verify", "tiny-1@65"], "there are tiny-1@64"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*wrong, *root])


def test_the_card_says_base_licence_data_and_scores(store: Store, tiny_base: Path, tmp_path: Path) -> None:
    saved = written(store, tiny_base, tmp_path)
    card = store.read_bytes(f"{saved.path}/README.md").decode()
    assert f"base_model: {tiny_base}" in card
    assert "| dataset version | dddd" in card
    assert "| training loss | 0.5 |" in card
    assert "Not measured yet" in card
    assert "license: other" in card
    sd14 = replace(saved, base={**saved.base, "model": "CompVis/stable-diffusion-v1-4", "revision": "abc"})
    rewritten = checkpoints.write(store, sd14, tmp_path / "weights")
    card = store.read_bytes(f"{saved.path}/README.md").decode()
    assert rewritten.licence == "creativeml-openrail-m"
    assert card.startswith("---\nlicense: creativeml-openrail-m\nbase_model: CompVis/stable-diffusion-v1-4\n")
    assert "CompVis/stable-diffusion-v1-4 at revision abc" in card
    assert "Attachment A" in card
    checkpoints.write(store, sd14, tmp_path / "weights")
    assert store.read_bytes(f"{saved.path}/README.md").decode() == card
    assert "held-out works" not in card
    dealt = replace(saved, training={**saved.training, "settings": {"split_by": "artist"}})
    checkpoints.write(store, dealt, tmp_path / "weights")
    assert "| held-out works | chosen by the artist named first: " in store.read_bytes(f"{saved.path}/README.md").decode()
