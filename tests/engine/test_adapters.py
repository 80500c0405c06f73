"""LoRA adapters a request: as if fused into the base, loaded on demand, forgotten when others are used more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from momalisa import checkpoint
from momalisa.checkpoint import Checkpoint
from momalisa.config import Diffusion
from momalisa.engine import Broken, Done, Engine, Event, NoAdapter, Request
from momalisa.engine import engine as engine_module
from momalisa.storage import Store
from tests.engine.conftest import difference

REQUEST = Request("a red boat", seed=3, steps=3, guidance_scale=4.0, size_px=64)


def publish(store: Store, diffusion: Diffusion, name: str, seed: int, folder: Path) -> Checkpoint:
    """A LoRA of random weights, as training writes it."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    unet = checkpoint.load_base_unet(diffusion)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    weights = folder / name.replace("/", "-")
    checkpoint.save_weights(unet, weights, lora=True)
    run, images = name.split("/")
    entry = Checkpoint(f"checkpoints/{name}", run, int(images), diffusion.model_dump(), files={}, lora=True)
    return checkpoint.write(store, entry, weights)


@pytest.fixture(scope="module")
def store(diffusion: Diffusion, tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("store")))
    for seed, name in enumerate(("waves/1", "night/2", "stars/3")):
        publish(store, diffusion, name, seed, tmp_path_factory.mktemp("lora"))
    whole = tmp_path_factory.mktemp("whole")
    checkpoint.save_weights(checkpoint.load_base_unet(diffusion), whole)
    checkpoint.write(store, Checkpoint("checkpoints/whole/4", "whole", 4, diffusion.model_dump(), files={}), whole)
    other = Checkpoint(
        "checkpoints/other/5", "other", 5, Diffusion(model="miniature://diffusion").model_dump(), files={}, lora=True
    )
    checkpoint.write(store, other, whole)
    return store


def find(engine: Engine, *names: str) -> None:
    """Look adapters up, as whoever submits them must."""
    assert engine._adapters is not None
    for name in names:
        engine._adapters.catalogue.find(name)


@pytest.fixture
def engine(diffusion: Diffusion, store: Store) -> Engine:
    return Engine.load(diffusion, max_rows=8, store=store, max_adapters=2)


def test_each_request_is_drawn_by_its_own_adapter(engine: Engine, diffusion: Diffusion, store: Store) -> None:
    names = ["waves/1", None, "night/2", "waves/1", "stars/3"]
    pictures = engine.generate([replace(REQUEST, adapter=name) for name in names])
    base = Engine.load(diffusion).generate([REQUEST])[0]
    assert difference(pictures[1], base) <= 1
    for name, picture in zip(names, pictures, strict=True):
        if name is not None:
            fused = checkpoint.load_unet(store, checkpoint.read(store, f"checkpoints/{name}"))
            assert difference(picture, Engine.load(diffusion, fused).generate([REQUEST])[0]) <= 1
            assert difference(picture, base) > 1
    engine.close()


def test_adapters_share_the_base_s_weights_and_the_least_used_goes(engine: Engine) -> None:
    adapters = engine._adapters
    assert adapters is not None
    for name in ("waves/1", "night/2", "waves/1", "stars/3"):
        engine.generate([replace(REQUEST, adapter=name)])
    assert list(adapters._loaded) == ["waves/1", "stars/3"]
    own = {parameter.data_ptr() for parameter in engine.unet.parameters()}
    drawn = adapters._loaded["stars/3"].result().unet
    assert {name for name, value in drawn.named_parameters() if value.data_ptr() not in own} == {
        name for name, _ in drawn.named_parameters() if "lora_" in name
    }
    engine.close()


def test_others_are_drawn_while_an_adapter_is_loaded(engine: Engine) -> None:
    find(engine, "waves/1")
    slow, quick = engine.submit(replace(REQUEST, adapter="waves/1")), engine.submit(replace(REQUEST, steps=1))
    first = engine.tick()
    assert [event.id for event in first] == [quick]
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()
    assert [event.id for event in events if isinstance(event, Done)] == [slow]
    engine.close()


def test_a_file_that_was_changed_breaks_its_requests_only(diffusion: Diffusion, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    published = publish(store, diffusion, "waves/1", 0, tmp_path)
    store.write_bytes(f"{published.path}/weights/{checkpoint.LORA_FILE}", b"not what it was")
    engine = Engine.load(diffusion, store=store)
    find(engine, "waves/1")
    bad, good = engine.submit(replace(REQUEST, adapter="waves/1")), engine.submit(REQUEST)
    events = {}
    while not engine.idle:
        events |= {event.id: event for event in engine.tick()}
    broken = events[bad]
    assert isinstance(broken, Broken)
    assert checkpoint.LORA_FILE in str(broken.error)
    assert isinstance(events[good], Done)
    engine.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/9", "holds no complete checkpoint"),
        ("../../etc/passwd", "is not of the form run/images"),
        ("whole/4", "is a whole model, not a LoRA"),
        ("other/5", "was trained on another base model"),
    ],
)
def test_names_that_are_no_adapter(engine: Engine, name: str, message: str) -> None:
    with pytest.raises(NoAdapter, match=message):
        engine.generate([replace(REQUEST, adapter=name)])
    assert engine.idle
    engine.close()


def test_submit_waits_for_no_store(engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "read_bytes", lambda path: 1 / 0)
    with pytest.raises(NoAdapter, match="has not been looked up"):
        engine.submit(replace(REQUEST, adapter="waves/1"))
    engine.close()


def test_an_adapter_that_waits_for_a_place_gets_one_though_others_are_always_asked_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PLACE_S", 0.0)
    find(engine, "waves/1", "night/2", "stars/3")
    plain, drawn = replace(REQUEST, guidance_scale=1.0), list[int]()

    def tick() -> None:
        events = engine.tick()
        assert all(isinstance(event, Done) for event in events), events
        drawn.extend(event.id for event in events)

    crowd = [replace(plain, adapter=name, steps=3 + n % 5) for n in range(30) for name in ("waves/1", "night/2")]
    asked = [engine.submit(request) for request in crowd]  # eight at a time, that do not end together
    while len(drawn) < 8:
        tick()
    alone = engine.submit(replace(plain, adapter="stars/3"))
    while alone not in drawn:
        tick()
    assert len(drawn) < len(asked) - 10
    while not engine.idle:
        tick()
    assert sorted(drawn) == [*asked, alone]  # and nobody is lost
    engine.close()


def test_an_engine_without_a_store(diffusion: Diffusion) -> None:
    with pytest.raises(ValueError, match="there is no store to load it from"):
        Engine.load(diffusion).submit(replace(REQUEST, adapter="waves/1"))


def test_room_for_one_adapter_at_least(diffusion: Diffusion, store: Store) -> None:
    with pytest.raises(ValueError, match="max_adapters=0 must be at least 1"):
        Engine.load(diffusion, store=store, max_adapters=0)
