"""What is measured, of which weights, and that measuring disturbs nobody."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from momalisa import checkpoint as checkpoints
from momalisa import config, promotion
from momalisa.checkpoint import Checkpoint
from momalisa.config import Settings
from momalisa.latents import TextEncoder
from momalisa.miniature import models
from momalisa.promotion import general, measure
from momalisa.promotion.measure import DISTANCE, GATES, LOSSES
from momalisa.storage import Store
from momalisa.training.model import Denoiser, of_unet, save_text_adapters
from momalisa.training.watch import EarlyStop
from tests.promotion.conftest import Museum

TEN = "checkpoints/run/000000010"


def changed(settings: Settings, **promote: object) -> Settings:
    return settings.model_copy(update={"promote": settings.promote.model_copy(update=promote)})


def test_losses_are_of_the_base_and_of_a_checkpoint_on_one_grid(museum: Museum) -> None:
    settings, planned = museum
    base, ten = (measure.measured(settings, planned, path, LOSSES) for path in (None, TEN))
    assert len(base["held_out"]) == len(ten["held_out"]) == 5
    assert set(base) == {"checkpoint", "rules", "held_out"}
    assert base["rules"] == ten["rules"]
    assert np.abs(np.array(base["held_out"]) - ten["held_out"]).min() > 1e-4
    assert ten["checkpoint"] == TEN


def test_what_is_measured_is_kept_and_not_measured_again(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, planned = museum
    assert measure.known(settings, planned, TEN, LOSSES) is None
    first = measure.measured(settings, planned, TEN, LOSSES)
    monkeypatch.setattr(measure, "load", lambda *_: pytest.fail("measured again"))
    assert measure.measured(settings, planned, TEN, LOSSES) == first
    other = measure.place(changed(settings, timesteps=3), planned, TEN, LOSSES)
    assert other != measure.place(settings, planned, TEN, LOSSES)
    assert measure.place(changed(settings, tasks=7), planned, TEN, LOSSES) == measure.place(settings, planned, TEN, LOSSES)


def test_other_weights_in_the_same_place_are_measured_anew(museum: Museum) -> None:
    settings, planned = museum
    store = Store(settings.root)
    before = measure.place(settings, planned, TEN, LOSSES)
    manifest = store.read_json(f"{TEN}/manifest.json")
    manifest["files"]["config.json"] = "0" * 64
    store.write_json(f"{TEN}/manifest.json", manifest)
    assert measure.place(settings, planned, TEN, LOSSES) != before


def test_measuring_leaves_every_random_state_as_it_was(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, planned = museum
    load = measure.load
    monkeypatch.setattr(measure, "load", lambda *arguments: (torch.rand(3), load(*arguments))[1])  # a careless library
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for what in (LOSSES, GATES):
        for path in (None, TEN):
            measure.measured(settings, planned, path, what)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_a_gpu_is_taken_where_one_was_asked_for(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, planned = museum
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # one is visible; whoever touches it fails, for there is none
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for what in (LOSSES, GATES):
        assert "error" not in measure.measured(settings, planned, TEN, what)
    assert not torch.backends.cudnn.allow_tf32
    reserved = changed(settings, gpus_per_task=0.5)
    assert [measure.device(one).type for one in (settings, reserved)] == ["cpu", "cuda"]
    beside = reserved.model_copy(update={"train": settings.train.model_copy(update={"gpus_per_worker": 1.0})})
    stops = [EarlyStop(one, planned) for one in (reserved, beside)]  # measures where training is
    assert [measure.device(stop.settings).type for stop in stops] == ["cpu", "cuda"]


def test_a_damaged_checkpoint_is_an_error_and_leaves_nothing(museum: Museum) -> None:
    settings, planned = museum
    store = Store(settings.root)
    name = f"{TEN}/weights/diffusion_pytorch_model.safetensors"
    store.write_bytes(name, store.read_bytes(name)[:-100])
    assert "has sha256" in measure.measured(settings, planned, TEN, LOSSES)["error"]
    store.delete(name)
    assert "does not exist" in measure.measured(settings, planned, TEN, LOSSES)["error"]
    assert measure.known(settings, planned, TEN, LOSSES) is None


def test_pictures_are_compared_with_what_was_trained_on(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, planned = museum
    training, held_out = measure.runs.split(settings, planned)
    shades = {id: Image.new("RGB", (32, 32), (12 * int(id.removeprefix("work-")), 0, 0)) for id in training.ids + held_out.ids}
    trained, unseen = shades[training.ids[0]], shades[held_out.ids[0]]
    drawn = [measure.png(picture) for picture in (trained, unseen, trained, Image.new("RGB", (32, 32), "white"))]
    monkeypatch.setattr(measure, "drawn", lambda settings, unet, prompts, seed: drawn)
    found = measure.measured(settings, planned, TEN, GATES)
    assert found["alignment"] is None
    near = found["nearest"]
    assert near[0] == near[2] == pytest.approx(0, abs=1e-6)
    assert near[1] > 0.02
    assert near[3] > 0.5
    assert 0 < found["limit"] <= near[1]


def test_whoever_the_plan_holds_out_is_measured_on_and_nobody_else(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, planned = museum
    held_out = ("work-2", "work-3", "work-5")
    planned = replace(planned, held_out=held_out)
    monkeypatch.setattr(measure, "_grid", lambda settings, model, rows: rows.ids)
    assert measure.measured(settings, planned, TEN, LOSSES)["held_out"] == list(held_out)
    pairs, _ = measure.references(changed(settings, distance_pictures=9), planned)
    assert [caption for caption, _ in pairs] == [f"A MOMA artwork of: {name}" for name in held_out]


def test_without_thumbnails_nothing_is_said_of_copies(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, planned = museum
    monkeypatch.setattr(measure, "thumbnails", lambda _: {})
    found = measure.measured(settings, planned, TEN, GATES)
    assert (found["nearest"], found["limit"]) == (None, None)


def test_the_prompts_are_captions_of_training_works(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, planned = museum
    asked: list[str] = []

    def drawn(settings: Settings, unet: object, prompts: list[str], seed: int) -> list[bytes]:
        asked.extend(prompts)
        return [measure.png(Image.new("RGB", (32, 32)))] * len(prompts)

    monkeypatch.setattr(measure, "drawn", drawn)
    measure.measured(settings, planned, None, GATES)
    training, _ = measure.runs.split(settings, planned)
    assert len(set(asked)) == 4
    assert set(asked) <= set(training.captions)


def test_pictures_depend_on_prompt_and_seed_and_not_on_the_piece(museum: Museum) -> None:
    settings, _ = museum
    whole = measure.generate(settings, None, ["a", "b", "c"], first_seed=5)
    assert [picture.size for picture in measure.opened(whole)] == [(32, 32)] * 3
    pieces = [*measure.generate(settings, None, ["a"], 5), *measure.generate(settings, None, ["b", "c"], 6)]
    for one, other in zip(measure.opened(whole), measure.opened(pieces), strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_references_are_held_out_works_with_their_captions(museum: Museum) -> None:
    settings, planned = museum
    pairs, more = measure.references(changed(settings, distance_pictures=2), planned)
    _, held_out = measure.runs.split(settings, planned)
    assert more == []
    assert len(pairs) == 2
    for caption, picture in pairs:
        name = caption.removeprefix("A MOMA artwork of: ")
        assert name in held_out.ids
        assert picture.getpixel((0, 0)) == (12 * int(name.removeprefix("work-")), 0, 0)


def test_the_distance_says_what_it_was_measured_on(museum: Museum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, planned = museum
    tokenizer = models.build_clip_tokenizer()
    torch.manual_seed(0)
    models.build_clip(tokenizer).save_pretrained(tmp_path / "clip")
    models.clip_processor(tokenizer).save_pretrained(tmp_path / "clip")
    judged = changed(settings, distance_pictures=3, clip_model=str(tmp_path / "clip"))
    found = measure.measured(judged, planned, None, DISTANCE)
    assert found["pictures"] == 3
    assert found["mmd"] == measure.measured(judged, planned, None, DISTANCE)["mmd"]
    assert measure.collection_distance(judged, planned) is None  # no more works than these
    pairs, _ = measure.references(judged, planned)
    monkeypatch.setattr(measure, "references", lambda *_: (pairs, [picture for _, picture in pairs]))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert measure.collection_distance(judged, planned) is not None
    assert not torch.backends.cudnn.allow_tf32


def test_general_captions_are_two_hundred_and_varied() -> None:
    texts = general.captions(200)
    assert len(set(texts)) == 200
    assert len({text.split()[1] for text in texts}) > 100
    assert set(general.captions(50)) < set(texts)
    with pytest.raises(ValueError, match="general_pictures=201 is more than the 200"):
        general.captions(201)


def test_the_base_draws_its_general_pictures_once(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = museum
    general.draw(settings, torch.device("cpu"))
    cache = general.load(settings)
    assert cache.captions == general.captions(3)
    assert [tuple(moments.shape) for moments in cache.moments] == [(8, 4, 4)] * 3
    assert not torch.equal(cache.moments[0], cache.moments[1])
    before = Store(settings.root).read_bytes(general.path(settings))
    monkeypatch.setattr(general.Engine, "load", lambda *_: pytest.fail("drawn again"))
    general.draw(settings, torch.device("cpu"))
    assert Store(settings.root).read_bytes(general.path(settings)) == before
    assert general.path(changed(settings, guidance_scale=2.0)) != general.path(settings)
    larger = settings.model_copy(update={"encode": config.Encode(resolution_px=64)})
    assert general.path(larger) != general.path(settings)


def test_the_contact_sheet_pairs_base_and_best(museum: Museum) -> None:
    settings, _ = museum
    red, blue = (measure.png(Image.new("RGB", (16, 16), colour)) for colour in ("red", "blue"))
    prompts = ["A MOMA artwork of: x", "y", "z"]
    sheet = Image.open(io.BytesIO(promotion.comparison(settings, prompts, [red] * 3, [blue] * 3)))
    columns = [sheet.getpixel((sheet.width * (2 * i + 1) // 8, sheet.height // 4)) for i in range(4)]
    assert columns == [(255, 0, 0), (0, 0, 255)] * 2  # two pairs a row
    assert [sheet.getpixel((sheet.width * (2 * i + 1) // 8, 3 * sheet.height // 4)) for i in (2, 3)] == [(255, 255, 255)] * 2


def test_the_gates_hold_what_the_settings_ask_for(museum: Museum) -> None:
    settings, planned = museum
    both = measure.measured(settings, planned, TEN, GATES)
    assert (len(both["general"]), len(both["nearest"])) == (3, 4)
    general_only = measure.measured(changed(settings, gate_pictures=0), planned, TEN, GATES)
    assert general_only["general"] == both["general"]
    assert general_only["nearest"] is None
    assert measure.measured(changed(settings, general_pictures=0), planned, TEN, GATES)["general"] is None
    assert measure.measured(settings, planned, None, GATES)["general"] != both["general"]


def test_a_checkpoint_is_measured_with_its_own_text_encoder(
    museum: Museum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, planned = museum
    store = Store(settings.root)
    torch.manual_seed(0)
    train = config.Train(lora_rank=2, lora_text_encoder=True)
    denoiser = Denoiser(checkpoints.load_base_unet(settings.diffusion), TextEncoder.load(settings.diffusion), train)
    values = {name: torch.randn_like(value) if "text_encoder" in name else value for name, value in denoiser.trained().items()}
    checkpoints.save_weights(denoiser.unet, tmp_path / "lora", of_unet(values), lora=True)
    save_text_adapters(tmp_path / "lora", denoiser.text_encoder, values)
    entry = Checkpoint("checkpoints/run/000000030", "run", 30, settings.diffusion.model_dump(), {}, lora=True)
    written = checkpoints.write(store, entry, tmp_path / "lora")
    own = measure.measured(settings, planned, written.path, LOSSES)["held_out"]
    pictures = measure.generate(settings, written.path, ["a boat"], 0)
    base = TextEncoder.load(settings.diffusion)
    monkeypatch.setattr(checkpoints, "load_text_encoder", lambda *_: base)
    store.delete(measure.place(settings, planned, written.path, LOSSES))
    assert measure.measured(settings, planned, written.path, LOSSES)["held_out"] != pytest.approx(own, rel=1e-3)
    assert measure.generate(settings, written.path, ["a boat"], 0) != pictures
