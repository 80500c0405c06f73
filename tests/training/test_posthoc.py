"""Averages chosen after training: what training leaves for them, what is made of it, and what stays."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import averages
from momalisa.checkpoint.__main__ import main
from momalisa.checkpoint.retention import retain
from momalisa.config import Diffusion, Promote, Settings, Train
from momalisa.storage import Store
from momalisa.training import posthoc
from momalisa.training.cache import LatentCache
from momalisa.training.loop import Events, Run, Trainer
from momalisa.training.model import save_trained
from momalisa.training.profile import exponent

TRAIN = Train(
    images=64,
    batch=8,
    workers=1,
    precision="fp32",
    learning_rate=3e-3,
    checkpoint_every_images=8,
    evaluate_every_steps=10_000,
    power_ema=True,
)


def build(base: Path, root: Path, **changes: Any) -> tuple[Run, Trainer]:
    source = torch.Generator().manual_seed(5)
    moments = torch.cat([torch.randn((6, 4, 4, 4), generator=source), torch.full((6, 4, 4, 4), -4.0)], dim=1).half()
    names = [f"work-{i}" for i in range(6)]
    cache = LatentCache(names, names, moments, torch.randint(0, 600, (6, 77), generator=source))
    train = Train(**{**TRAIN.model_dump(), **changes})
    run = Run("tiny-0", train, Diffusion(model=str(base)), cache, Store(str(root)))
    return run, Trainer(run, Events())


def trained(base: Path, root: Path, **changes: Any) -> tuple[Run, Trainer]:
    run, trainer = build(base, root, **changes)
    trainer.train()
    return run, trainer


@pytest.fixture(scope="module")
def full(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Trainer]:
    """Eight steps, each with a checkpoint, and averages tracked to the end."""
    return trained(tiny_base, tmp_path_factory.mktemp("full"))


def test_training_follows_the_profile_in_images(tiny_base: Path, tmp_path: Path) -> None:
    """The weights after each step count by the profile's share of its images."""
    run, trainer = build(tiny_base, tmp_path, checkpoint_every_images=10_000)
    step, path = trainer.step, []

    def noted() -> torch.Tensor:
        loss = step()
        path.append(trainer.trained["conv_out.bias"].detach().clone())
        return loss

    trainer.step = noted  # type: ignore[method-assign]
    trainer.train()
    for sigma_rel, average in trainer.powers.items():
        edges = (torch.arange(len(path) + 1, dtype=torch.float64) / len(path)) ** (exponent(sigma_rel) + 1)
        expected = (edges.diff()[:, None] * torch.stack(path)).sum(0).float()
        torch.testing.assert_close(average.shadow["conv_out.bias"], expected, rtol=1e-5, atol=1e-7)
    assert len(path) == run.train.images // run.train.batch


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_a_length_that_was_tracked_comes_back_bit_by_bit(full: tuple[Run, Trainer], sigma_rel: float) -> None:
    run, trainer = full
    made = posthoc.make(run.store, checkpoints.read_all(run.store, run.name)[-1], sigma_rel)
    assert (made.name, made.training["average"]) == (f"tiny-0-ema{sigma_rel:.3f}@64", {"sigma_rel": sigma_rel, "distance": 0.0})
    assert f"a power function, sigma_rel {sigma_rel:g} |" in run.store.read_bytes(f"{made.path}/README.md").decode()
    unet = checkpoints.load_unet(run.store, made)
    for name, value in unet.named_parameters():
        assert torch.equal(value, trainer.powers[sigma_rel].shadow[name]), name
    assert any(not torch.equal(value, trainer.ema.shadow[name]) for name, value in unet.named_parameters())


def test_another_length_lies_between_its_neighbours_and_at_an_earlier_end(full: tuple[Run, Trainer]) -> None:
    """0.07 of what was tracked at 48 images; the snapshots after that are not looked at."""
    run, trainer = full
    earlier = checkpoints.read_all(run.store, run.name)[5]
    made = posthoc.make(run.store, earlier, 0.07)
    assert (made.images_seen, made.path) == (48, "checkpoints/tiny-0-ema0.070/000000048")
    stored = averages.read_all(run.store, run.name)[5]
    ours = torch.nn.utils.parameters_to_vector(checkpoints.load_unet(run.store, made).parameters()).detach()
    low, high = (
        torch.cat([averages.load(run.store, stored, sigma)[name].flatten() for name in trainer.trained]) for sigma in (0.05, 0.1)
    )
    assert float((ours - low).norm()) < float((high - low).norm())
    assert float((ours - high).norm()) < float((high - low).norm())


def test_adapters_have_averages_too(tiny_base: Path, tmp_path: Path) -> None:
    run, trainer = trained(tiny_base, tmp_path / "store", images=16, lora_rank=2, lora_alpha=4.0)
    newest = checkpoints.read_all(run.store, run.name)[-1]
    made = posthoc.make(run.store, newest, 0.1)
    assert made.lora
    for average in trainer.ema.shadow.values():
        average.zero_()
    trainer.ema.shadow |= {name: value.clone() for name, value in trainer.powers[0.1].shadow.items()}
    ours, tracked = checkpoints.load_unet(run.store, made), trainer.snapshot()
    trainer.writer._thread.shutdown()
    written = replace(tracked.checkpoint, path="checkpoints/tracked/000000016", run="tracked")
    save_trained(tmp_path / "weights", tracked.denoiser, tracked.average)
    theirs = checkpoints.load_unet(run.store, checkpoints.write(run.store, written, tmp_path / "weights"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_what_cannot_be_made_is_refused_with_the_way_out(full: tuple[Run, Trainer], tiny_base: Path, tmp_path: Path) -> None:
    run, _ = full
    first = checkpoints.read_all(run.store, run.name)[0]
    with pytest.raises(ValueError, match=r"made of 1 snapshots would be \d+% off.*lower train.checkpoint_every_images"):
        posthoc.make(run.store, first, 0.25)
    bare, _ = trained(tiny_base, tmp_path, images=8, power_ema=False)
    with pytest.raises(ValueError, match=r"tiny-0@8 has no averages.*train.power_ema=true"):
        posthoc.make(bare.store, checkpoints.read_all(bare.store, bare.name)[0], 0.1)
    assert not [path for path in bare.store.list("checkpoints") if "averages" in path]
    snapshot = averages.read_all(run.store, run.name)[-1]
    copy = Store(str(tmp_path / "damaged"))
    copy.write_bytes(f"{snapshot.path}/0.1.safetensors", b"noise")
    with pytest.raises(ValueError, match=r"0\.1\.safetensors has sha256"):
        averages.load(copy, snapshot, 0.1)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"0.05.safetensors": 3}', b'{"../../x.safetensors": "0"}', b'{"nan.safetensors": "0"}', b"[" * 10**5],
)
def test_a_snapshot_that_is_damaged_is_passed_over_and_said(
    full: tuple[Run, Trainer], tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = full[0], copied(full[0], tmp_path)
    store.write_bytes(f"checkpoints/{run.name}/{24:09d}/averages/hashes.json", data)
    assert [one.images_seen for one in averages.read_all(store, run.name)] == [8, 16, 32, 40, 48, 56, 64]
    assert capsys.readouterr().out.count("000000024/averages/hashes.json is damaged") == 1


def copied(run: Run, place: Path) -> Store:
    return Store(str(shutil.copytree(run.store.root, place / "copy")))


def test_a_snapshot_that_goes_while_it_is_read_is_one_less(
    full: tuple[Run, Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = full[0], copied(full[0], tmp_path)
    listed = store.list

    def outlived(folder: str) -> list[str]:
        found = listed(folder)
        averages.retain(Store(store.root), run.name, 2)
        return found

    monkeypatch.setattr(store, "list", outlived)
    assert len(averages.read_all(store, run.name)) == 2


def test_an_average_that_cannot_be_made_is_said_and_the_others_are_made(full: tuple[Run, Trainer], tmp_path: Path) -> None:
    run, store = full[0], copied(full[0], tmp_path)
    newest = checkpoints.read_all(store, run.name)[-1]
    store.write_bytes(f"{newest.path}/averages/0.05.safetensors", b"noise")
    said = posthoc.attempt(store, newest, 0.05)
    assert said is not None
    assert said.startswith("the average of sigma_rel=0.05 at tiny-0@64 cannot be made: ")
    assert posthoc.attempt(store, newest, 0.1) is None
    store.delete(f"{newest.path}/averages/0.05.safetensors")
    assert "does not exist" in str(posthoc.attempt(store, newest, 0.05))
    assert [one.name for one in checkpoints.read_all(store, "tiny-0-ema0.100")] == ["tiny-0-ema0.100@64"]


def test_promote_chooses_among_the_lengths_that_can_be_made(full: tuple[Run, Trainer]) -> None:
    run, _ = full
    newest = checkpoints.read_all(run.store, run.name)[-1]
    settings = Settings(root=run.store.root, train=run.train, promote=Promote(ema_lengths=(0.06, 0.12, 0.28)))
    assert [sigma for _, sigma in posthoc.wanted(settings, run.name)] == [0.06, 0.12]  # nothing longer than 0.2 of so few
    assert posthoc.chosen(settings, newest) == []
    for one, sigma in posthoc.wanted(settings, run.name):
        posthoc.make(run.store, one, sigma)
    assert posthoc.wanted(settings, run.name) == []
    assert [one.name for one in posthoc.chosen(settings, newest)] == ["tiny-0-ema0.060@64", "tiny-0-ema0.120@64"]
    plain = settings.model_copy(update={"train": run.train.model_copy(update={"power_ema": False})})
    assert posthoc.wanted(plain, run.name) == posthoc.chosen(plain, newest) == []


def test_the_command_writes_a_checkpoint(full: tuple[Run, Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    main(["average", "tiny-0@64", "0.08", "--root", full[0].store.root])
    assert capsys.readouterr().out == "tiny-0-ema0.080@64 is written\n"
    main(["verify", "tiny-0-ema0.080@64", "--root", full[0].store.root])
    with pytest.raises(SystemExit, match=r"sigma_rel=0.5: the length .* at most 0\.28"):
        main(["average", "tiny-0@64", "0.5", "--root", full[0].store.root])


def test_snapshots_outlive_checkpoints_and_are_spread_over_the_run(tiny_base: Path, tmp_path: Path) -> None:
    run, _ = trained(tiny_base, tmp_path / "store", keep_averages=3, keep_weights=2)
    assert [found.images_seen for found in checkpoints.read_all(run.store, run.name)] == [56, 64]
    kept = [found.images_seen for found in averages.read_all(run.store, run.name)]
    assert len(kept) == 3
    assert kept[-1] == 64
    assert kept[0] < 48
    files = [path for path in run.store.list("checkpoints") if f"{kept[0]:09d}" in path]
    assert [path.rsplit("/", 1)[-1] for path in files] == ["0.05.safetensors", "0.1.safetensors", "hashes.json"]
    assert retain(run.store, run.name, keep_states=1, keep_weights=1)
    assert len(averages.read_all(run.store, run.name)) == 3


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 16])
def test_what_stays_is_even_whenever_it_is_looked_at(keep: int) -> None:
    kept: list[int] = []
    for time in range(10, 1010, 10):
        kept = averages.spread([*kept, time], keep)
        assert len(kept) == min(keep, time // 10)
        assert kept[-1] == time
    gaps = [after - before for before, after in zip([0, *kept], kept, strict=False)]
    assert max(gaps) <= 1000 if keep < 3 else max(gaps) <= 4 * 1000 / keep
