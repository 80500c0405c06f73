"""The best is chosen on evidence, and the same evidence is the same decision."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from momalisa import checkpoint as checkpoints
from momalisa import config, promotion
from momalisa.checkpoint import Checkpoint, NoCheckpoint
from momalisa.config import Settings
from momalisa.dataset import Dataset
from momalisa.miniature import models
from momalisa.promotion import Choice, Distance, NoImprovement, choose, evidence_id
from momalisa.quality import Difference
from momalisa.records import IMAGES, LATENTS, Artwork
from momalisa.storage import Store
from momalisa.training.run import Plan

BASE = np.array([1.0, 1.2, 0.8])


def made(images_seen: int, digest: str = "0" * 64) -> Checkpoint:
    base = {"model": "CompVis/stable-diffusion-v1-4", "revision": None, "variant": None}
    return Checkpoint(f"checkpoints/run/{images_seen:09d}", "run", images_seen, base, {"unet.safetensors": digest})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(root=str(tmp_path))


def test_the_lowest_held_out_loss_is_chosen(settings: Settings) -> None:
    found = [made(10), made(20), made(30)]
    choice = choose(settings, found, BASE, [BASE - 0.1, BASE - 0.3, BASE - 0.2])
    assert choice.best is found[1]
    assert choice.base_loss == pytest.approx(1.0)
    assert choice.best_loss == pytest.approx(0.7)
    assert choice.delta.mean == pytest.approx(-0.3)
    assert choice.curve == [(0, 1.0), (10, pytest.approx(0.9)), (20, pytest.approx(0.7)), (30, pytest.approx(0.8))]


def test_no_checkpoint_below_the_base_is_no_improvement(settings: Settings) -> None:
    with pytest.raises(NoImprovement, match=r"below the base's 1.00000 \(best: 1.10000 at 20 images\).*promote.allow_worse"):
        choose(settings, [made(10), made(20)], BASE, [BASE + 0.2, BASE + 0.1])
    with pytest.raises(NoImprovement):
        choose(settings, [made(10)], BASE, [BASE])
    allowed = Settings(root=settings.root, promote=config.Promote(allow_worse=True))
    assert choose(allowed, [made(10), made(20)], BASE, [BASE + 0.2, BASE + 0.1]).best.images_seen == 20


def test_the_evidence_names_what_decides(settings: Settings) -> None:
    first = evidence_id(settings, [made(10)])
    assert evidence_id(settings, [made(10)]) == first
    faster = Settings(root=settings.root, promote=config.Promote(tasks=7, batch=3, gpus_per_task=1, cpus_per_task=4))
    assert evidence_id(faster, [made(10)]) == first
    others = [
        evidence_id(settings, [made(10), made(20)]),
        evidence_id(settings, [made(10, "1" * 64)]),
        evidence_id(settings, [made(20)]),
        evidence_id(Settings(root=settings.root, promote=config.Promote(timesteps=3)), [made(10)]),
        evidence_id(Settings(root=settings.root, promote=config.Promote(clip_model="openai/clip-vit-base-patch32")), [made(10)]),
    ]
    assert len({first, *others}) == 6


def test_without_a_checkpoint_the_train_job_is_named(settings: Settings) -> None:
    with pytest.raises(NoCheckpoint, match=r"checkpoints/run-1 holds no checkpoint: run the train job first"):
        promotion.candidates(settings, Plan("run-1", "encoder", ()))


def test_publishing_moves_the_pointer(settings: Settings, tmp_path: Path) -> None:
    assert promotion.promoted(settings) is None
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    store = Store(settings.root)
    for images, measured in ((10, None), (20, Distance(3.0, 1.0, 0.5))):
        best = checkpoints.write(store, made(images), tmp_path / "weights")
        curve = [(0, 1.0), (images, 0.7)]
        said = promotion.publish(
            settings, Choice(best, 1.0, 0.7, Difference(-0.3, -0.4, -0.2), curve), measured, f"evidence-{images}"
        )
        assert checkpoints.read_best(store) == best
        assert store.read_json("refs/best") == promotion.promoted(settings)
        assert said["evidence"] == f"evidence-{images}"
        assert said["scores"]["heldout_loss_delta_ci95"] == [-0.4, -0.2]
        assert said["scores"]["mmd_best"] == (1.0 if measured else None)
    assert [found.images_seen for found in promotion.candidates(settings, Plan("run", "encoder", ()))] == [10, 20]


@pytest.fixture(scope="module")
def museum(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Plan]:
    """Twelve works with pictures and latents, and one checkpoint."""
    settings = Settings(
        root=str(tmp_path_factory.mktemp("museum")),
        diffusion=config.Diffusion(model=str(tiny_base)),
        encode=config.Encode(resolution_px=32),
        train=config.Train(held_out_fraction=0.4),
        promote=config.Promote(timesteps=2, max_pictures=3, distance_pictures=2, distance_steps=1, batch=2, guidance_scale=1.0),
    )
    dataset, source = Dataset(settings.dataset), torch.Generator().manual_seed(0)
    names = [f"work-{i}" for i in range(12)]
    pictures = [promotion.png(Image.new("RGB", (32, 32), (20 * i, 0, 0))) for i in range(12)]
    shape = {"channels": 4, "height": 4, "width": 4, "status": "ok", "error": "", "token_ids": [5] * 77}
    latents = [
        {
            "id": name,
            "moments": torch.randn((8, 4, 4), generator=source).half().numpy().tobytes(),
            "caption": f"A MOMA artwork of: {name}",
            **shape,
        }
        for name in names
    ]
    works = [Artwork(id=name, bytes=data).row() for name, data in zip(names, pictures, strict=True)]
    tables = [dataset.put_rows("latents/e", latents, LATENTS)]
    images = [dataset.put_rows("images", works, IMAGES)]
    dataset.publish(dataset.latest().with_images(images).with_latents("e", tables))
    folder, unet = tmp_path_factory.mktemp("weights"), checkpoints.load_base_unet(settings.diffusion)
    for value in unet.conv_out.parameters():
        value.data.zero_()
    checkpoints.save_weights(unet, folder, lora=False)
    entry = Checkpoint("checkpoints/run/000000010", "run", 10, settings.diffusion.model_dump(), {})
    checkpoints.write(Store(settings.root), entry, folder)
    return settings, Plan("run", "e", tuple(tables))


def test_losses_are_of_base_and_checkpoints_on_held_out_works(museum: tuple[Settings, Plan]) -> None:
    settings, planned = museum
    base, checkpoint, again = promotion.losses(settings, planned, [None, "checkpoints/run/000000010", None])
    assert base.shape == checkpoint.shape == (3,)
    assert np.array_equal(base, again)
    assert np.abs(base - checkpoint).min() > 1e-4


def test_pictures_depend_on_prompt_and_seed_and_not_on_the_piece(museum: tuple[Settings, Plan]) -> None:
    settings, _ = museum
    whole = promotion.generate(settings, None, ["a", "b", "c"], first_seed=5)
    assert [picture.size for picture in promotion.opened(whole)] == [(32, 32)] * 3
    pieces = [*promotion.generate(settings, None, ["a"], 5), *promotion.generate(settings, None, ["b", "c"], 6)]
    for one, other in zip(promotion.opened(whole), promotion.opened(pieces), strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_references_are_held_out_works_with_their_captions(museum: tuple[Settings, Plan]) -> None:
    settings, planned = museum
    pairs, more = promotion.references(settings, planned)
    _, held_out = promotion.runs.split(settings, planned)
    assert more == []
    assert len(pairs) == 2
    for caption, picture in pairs:
        name = caption.removeprefix("A MOMA artwork of: ")
        assert name in held_out.ids
        assert picture.getpixel((0, 0)) == (20 * int(name.removeprefix("work-")), 0, 0)


def test_the_distance_is_nearer_for_the_nearer(tmp_path: Path) -> None:
    tokenizer = models.build_clip_tokenizer()
    torch.manual_seed(0)
    models.build_clip(tokenizer).save_pretrained(tmp_path)
    models.clip_processor(tokenizer).save_pretrained(tmp_path)
    settings = Settings(promote=config.Promote(clip_model=str(tmp_path)))
    shades = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(180, 255, 15)]
    far = [promotion.png(Image.effect_noise((64, 64), 20 * i + 50)) for i in range(4)]
    measured = promotion.distance(settings, shades[::2], shades[1::2], far, [promotion.png(picture) for picture in shades])
    assert measured.best < measured.base
    assert measured.collection is not None
    assert measured.collection < measured.base
    assert promotion.distance(settings, shades, [], far, far).collection is None


def test_the_contact_sheet_pairs_base_and_best(settings: Settings) -> None:
    red, blue = (promotion.png(Image.new("RGB", (16, 16), colour)) for colour in ("red", "blue"))
    prompts = ["A MOMA artwork of: x", "y", "z"]
    sheet = Image.open(io.BytesIO(promotion.comparison(settings, prompts, [red] * 3, [blue] * 3)))
    columns = [sheet.getpixel((sheet.width * (2 * i + 1) // 8, sheet.height // 4)) for i in range(4)]
    assert columns == [(255, 0, 0), (0, 0, 255)] * 2  # two pairs a row
    assert [sheet.getpixel((sheet.width * (2 * i + 1) // 8, 3 * sheet.height // 4)) for i in (2, 3)] == [(255, 255, 255)] * 2
