"""What hangs in the hall: moved by one at a time, written down for good, and taken back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from momalisa import checkpoint as checkpoints
from momalisa.checkpoint import BEST, Checkpoint
from momalisa.checkpoint.retention import forget
from momalisa.promotion import ledger
from momalisa.promotion.ledger import Overtaken
from momalisa.storage import Pointer, StorageError, Store
from tests.promotion.conftest import SD14

Written = Callable[[int], Checkpoint]


def promote(store: Store, checkpoint: Checkpoint, evidence: str = "e", seen: Pointer | None = None) -> None:
    pointer = store.read_pointer(BEST) if seen is None else seen
    ledger.promote(store, checkpoint, "evidence", pointer, {"heldout_loss_best": 0.5, "heldout_loss_base": 0.6}, evidence, "why")


def names(store: Store) -> list[str]:
    return [entry["name"] for entry in ledger.log(store)]


def test_every_promotion_is_an_entry_that_never_changes(store: Store, written: Written) -> None:
    assert list(ledger.log(store)) == []
    before: dict[str, bytes] = {}
    for images in (10, 20, 30):
        promote(store, written(images), f"e{images}")
        for path, data in before.items():
            assert store.read_bytes(path) == data
        before = {path: store.read_bytes(path) for path in store.list("promotions")}
    assert names(store) == ["run@30", "run@20", "run@10"]
    assert [entry["number"] for entry in ledger.log(store)] == [3, 2, 1]
    assert checkpoints.read_best(store).images_seen == 30
    assert "run@30  loss 0.50000 (base 0.60000)  why" in ledger.line(next(ledger.log(store)))


def test_a_rollback_goes_back_step_by_step_and_is_written_down(store: Store, written: Written) -> None:
    for images in (10, 20, 30):
        promote(store, written(images), f"e{images}")
    ledger.rollback(store)
    assert checkpoints.read_best(store).images_seen == 20
    assert store.read_json(BEST)["evidence"] == "e30"  # the evidence that was overruled does not win again
    ledger.rollback(store)
    assert checkpoints.read_best(store).images_seen == 10
    with pytest.raises(ValueError, match="nothing was promoted before"):
        ledger.rollback(store)
    assert names(store) == ["run@10", "run@20", "run@30", "run@20", "run@10"]
    promote(store, checkpoints.find(store, "run@30"))
    ledger.rollback(store)
    assert checkpoints.read_best(store).images_seen == 10


def test_a_rollback_passes_over_what_is_not_whole_any_more(
    store: Store, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [written(images) for images in (10, 20, 30, 40)]
    for one in made:
        promote(store, one)
    forget(store, made[2])
    store.write_bytes(f"{made[1].path}/weights/config.json", b"{}")
    ledger.rollback(store)
    assert checkpoints.read_best(store).images_seen == 10
    said = capsys.readouterr().out
    assert "run@30 is passed over" in said
    assert "run@20 is passed over" in said
    with pytest.raises(ValueError, match="nothing was promoted before"):
        ledger.rollback(store)
    assert names(store) == ["run@10", "run@40", "run@30", "run@20", "run@10"]


def test_where_the_storage_does_not_answer_nothing_is_passed_over(
    store: Store, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    for images in (10, 20, 30):
        promote(store, written(images))
    read = store.read_bytes

    def silent(path: str) -> bytes:
        if path.endswith("000000020/manifest.json"):
            raise StorageError("the bucket could not be reached")
        return read(path)

    monkeypatch.setattr(store, "read_bytes", silent)
    with pytest.raises(StorageError, match="could not be reached"):
        ledger.rollback(store)
    with pytest.raises(StorageError, match="could not be reached"):
        checkpoints.read_all(store, "run")
    assert checkpoints.read_best(store).images_seen == 30


def test_promoting_the_same_again_is_no_step_to_take_back(store: Store, written: Written) -> None:
    promote(store, written(10), "e1")
    second = written(20)
    promote(store, second, "e2")
    promote(store, second, "e3")
    ledger.rollback(store)
    assert checkpoints.read_best(store).images_seen == 10


def test_nothing_promoted_nothing_to_go_back_to(store: Store) -> None:
    with pytest.raises(ValueError, match="refs/best: nothing was promoted before"):
        ledger.rollback(store)


def test_of_two_at_once_one_wins_and_the_other_is_told(store: Store, written: Written) -> None:
    promote(store, written(10))
    seen, results = store.read_pointer(BEST), []
    both = [written(20), written(30)]
    barrier = threading.Barrier(2)

    def work(checkpoint: Checkpoint) -> None:
        barrier.wait()
        try:
            promote(store, checkpoint, seen=seen)
            results.append(checkpoint.name)
        except Overtaken as error:
            results.append(str(error))

    threads = [threading.Thread(target=work, args=(one,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = checkpoints.read_best(store)
    assert winner.name in results
    (told,) = [said for said in results if said != winner.name]
    assert f"was moved to {winner.path} meanwhile" in told
    assert names(store) == [winner.name, "run@10"]  # the other's entry is not in the chain
    assert len(store.list("promotions")) == 3


def test_a_damaged_checkpoint_is_never_promoted(store: Store, written: Written) -> None:
    promote(store, written(10))
    damaged = written(20)
    store.write_bytes(f"{damaged.path}/weights/config.json", b"{}")
    with pytest.raises(ValueError, match=r"000000020/weights/config.json has sha256"):
        promote(store, damaged)
    store.delete(f"{damaged.path}/weights/config.json")
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        promote(store, damaged)
    assert names(store) == ["run@10"]


def test_a_pointer_from_before_there_was_a_log_is_followed_on(store: Store, written: Written) -> None:
    store.write_json(BEST, {"checkpoint": written(10).path})
    promote(store, written(20))
    assert names(store) == ["run@20"]
    with pytest.raises(ValueError, match="nothing was promoted before"):
        ledger.rollback(store)


@pytest.mark.integration
def test_in_a_bucket_too_one_wins_and_the_log_only_grows(bucket: str, tmp_path: Path) -> None:
    store = Store(f"{bucket}/hall")
    (tmp_path / "config.json").write_text("{}")
    made = [checkpoints.write(store, Checkpoint(f"checkpoints/run/{n}", "run", n, SD14, {}), tmp_path) for n in (10, 20, 30)]
    promote(store, made[0])
    seen = store.read_pointer(BEST)
    promote(store, made[1], seen=seen)
    with pytest.raises(Overtaken, match="was moved to checkpoints/run/20 meanwhile"):
        promote(store, made[2], seen=seen)
    assert names(store) == ["run@20", "run@10"]
    assert len(store.list("promotions")) == 3
    ledger.rollback(store)
    assert names(store) == ["run@10", "run@20", "run@10"]
