"""From checkpoints to a choice that is published, explained, overruled and taken back."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from momalisa import checkpoint as checkpoints
from momalisa import config, promotion, votes
from momalisa.checkpoint import NoCheckpoint, averages
from momalisa.checkpoint.retention import forget
from momalisa.config import Settings
from momalisa.promotion import NoImprovement, explain, ledger, measure
from momalisa.promotion.decision import Decision
from momalisa.promotion.panel import Panel
from momalisa.storage import Store
from momalisa.training import run as runs
from momalisa.training.run import Plan
from momalisa.votes import Vote
from ray_jobs import promote as job
from tests.promotion.conftest import Museum, evidence


def changed(settings: Settings, **promote: object) -> Settings:
    return settings.model_copy(update={"promote": settings.promote.model_copy(update=promote)})


def decide(museum: Museum, **promote: object) -> Decision:
    settings, planned = museum
    settings = changed(settings, **promote)
    return Panel(settings, planned, promotion.candidates(settings, planned)).decide()


def name(decision: Decision) -> str | None:
    return decision.best.name if decision.best else None


def pretend(monkeypatch: pytest.MonkeyPatch, results: dict[int, dict[str, Any]]) -> list[tuple[str | None, str]]:
    """Measurements made up by images seen (0: the base), and which of them were asked for."""
    asked: list[tuple[str | None, str]] = []

    def measured(settings: Settings, planned: Plan, path: str | None, what: str) -> dict[str, Any]:
        asked.append((path, what))
        one = results[int(path[-9:]) if path else 0]
        empty = {"general": None, "alignment": None, "nearest": None, "limit": None, "pictures": 0}
        return {**empty, **{key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in one.items()}}

    monkeypatch.setattr(measure, "measured", measured)
    monkeypatch.setattr(measure, "known", lambda *_: None)
    monkeypatch.setattr(measure, "collection_distance", lambda *_: None)
    monkeypatch.setattr(promotion.panel.general, "draw", lambda *_: None)
    return asked


def losses(mean: float) -> np.ndarray:
    return mean + np.linspace(-0.1, 0.1, 41)


COPIED, FRESH = {"nearest": [0.0] * 40, "limit": 0.1}, {"nearest": [1.0] * 40, "limit": 0.1}


def test_measured_in_earnest_the_better_one_is_promoted_and_recorded(museum: Museum) -> None:
    settings, _planned = museum
    decision = decide(museum)
    assert name(decision) == "run@10"
    assert decision.reason == "lowest held-out loss of those that pass every gate"
    said = promotion.publish(settings, decision, "evidence")
    store = Store(settings.root)
    assert checkpoints.read_best(store).images_seen == 10
    assert said["scores"]["heldout_loss_best"] < said["scores"]["heldout_loss_base"]
    assert said["scores"]["heldout_curve"][0][0] == 0
    card = store.read_bytes("checkpoints/run/000000010/README.md").decode()
    assert "heldout loss best" in card
    assert promotion.promoted(settings) == store.read_json("refs/best")


def test_the_one_that_copies_is_passed_over_for_an_earlier_one(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {0: {"held_out": losses(1.0)}, 10: {"held_out": losses(0.8), **FRESH}, 20: {"held_out": losses(0.7), **COPIED}}
    asked = pretend(monkeypatch, results)
    decision = decide(museum)
    assert name(decision) == "run@10"
    assert [path for path, what in asked if what == measure.GATES and path] == [f"checkpoints/run/0000000{n}" for n in (20, 10)]
    assert "100% of its pictures are copies" in explain.verdict(museum[0].promote, decision, decision.candidates[1])


def test_pictures_are_drawn_only_for_those_that_could_win(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {0: {"held_out": losses(1.0)}, 10: {"held_out": losses(0.8), **FRESH}, 20: {"held_out": losses(0.7), **FRESH}}
    asked = pretend(monkeypatch, results)
    assert name(decide(museum)) == "run@20"
    assert ("checkpoints/run/000000010", measure.GATES) not in asked
    decide(museum, measure_all=True)
    assert ("checkpoints/run/000000010", measure.GATES) in asked


def test_a_tie_goes_to_the_nearer_to_the_collection_where_that_can_be_told(
    museum: Museum, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = losses(0.7) + np.where(np.arange(41) % 2, 0.1, -0.09)
    for counted, expected in ((600, "run@20"), (400, "run@10")):
        results = {
            0: {"held_out": losses(1.0), "mmd": 9.0, "pictures": counted},
            10: {"held_out": losses(0.7), "mmd": 5.0, "pictures": counted, **FRESH},
            20: {"held_out": other, "mmd": 4.0, "pictures": counted, **FRESH},
        }
        pretend(monkeypatch, results)
        decision = decide(museum, distance_pictures=600, clip_model="miniature://clip")
        assert name(decision) == expected, counted
        assert "tied" in decision.reason
    assert "(400 held-out works to compare with, promote.tie_pictures=500)" in decision.reason
    for distance, said in ((300, "promote.distance_pictures=300 is below promote.tie_pictures=500"), (0, "is not set")):
        assert said in decide(museum, distance_pictures=distance, clip_model="miniature://clip").reason


def test_of_those_that_people_prefer_the_strongest_that_passes(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = museum
    store = Store(settings.root)
    manifest = store.read_json("checkpoints/run/000000010/manifest.json")
    for images in (30, 40):
        path = f"checkpoints/run/{images:09d}"
        store.write_json(f"{path}/manifest.json", {**manifest, "path": path, "images_seen": images})
    results = {
        0: {"held_out": losses(1.0)},
        10: {"held_out": losses(0.7), **FRESH},
        20: {"held_out": losses(0.8), **COPIED},
        30: {"held_out": losses(0.85), **FRESH},
        40: {"held_out": losses(0.75), **FRESH},
    }
    pretend(monkeypatch, results)
    for better, wins in (("run@20", 190), ("run@30", 150), ("run@40", 110)):
        votes.cast(store, [Vote(better, "run@10")] * wins + [Vote("run@10", better)] * (200 - wins))
    decision = decide(museum)
    assert (name(decision), decision.reason) == ("run@30", "600 votes prefer it to run@10")
    assert decision.votes.strongest == "run@30"
    results[30] |= COPIED
    refused = decide(museum)  # 110 of 200 may be chance
    assert name(refused) == "run@10"
    assert refused.votes.strongest == "run@20"


def test_a_copy_gate_that_could_not_be_measured_is_said(
    museum: Museum, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {0: {"held_out": losses(1.0)}, 10: {"held_out": losses(0.8)}, 20: {"held_out": losses(0.7)}}
    pretend(monkeypatch, results)
    settings, _ = museum
    decision = decide(museum, measure_all=True)
    assert capsys.readouterr().out.count("promote: the copy gate is left out: not enough works have a thumbnail") == 1
    for one in decision.candidates:
        assert "the copy gate is left out" in explain.verdict(settings.promote, decision, one)
    wanted_none = changed(settings, gate_pictures=0).promote
    assert explain.verdict(wanted_none, decision, decision.candidates[0]) == "passes"
    pretend(monkeypatch, {images: {**result, **FRESH} for images, result in results.items()})
    decide(museum, measure_all=True)
    assert "left out" not in capsys.readouterr().out


def test_enough_votes_overrule_the_scores_but_no_gate(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {0: {"held_out": losses(1.0)}, 10: {"held_out": losses(0.8), **FRESH}, 20: {"held_out": losses(0.7), **FRESH}}
    pretend(monkeypatch, results)
    store = Store(museum[0].root)
    votes.cast(store, [Vote("run@10", "run@20")] * 150 + [Vote("run@20", "run@10")] * 49)
    assert name(decide(museum)) == "run@20"  # 199
    votes.cast(store, [Vote("run@10", "run@20")])
    decision = decide(museum)
    assert (name(decision), decision.reason) == ("run@10", "200 votes prefer it to run@20")
    assert "200 votes; run@10 over the scores' leader by +1." in explain.table(museum[0].promote, decision)
    results[10] |= COPIED
    assert name(decide(museum)) == "run@20"


def test_a_damaged_checkpoint_is_passed_over_and_named(museum: Museum, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(museum[0].root)
    store.write_bytes("checkpoints/run/000000010/weights/config.json", b"{}")
    decision = decide(museum, allow_worse=True)
    assert name(decision) == "run@20"
    assert "run@10 is passed over" in capsys.readouterr().out
    assert "not whole" in explain.table(museum[0].promote, decision)


def test_nothing_better_is_an_error_with_the_reasons_unless_it_is_allowed(
    museum: Museum, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {0: {"held_out": losses(1.0)}, 10: {"held_out": losses(1.2)}, 20: {"held_out": losses(1.1)}})
    with pytest.raises(NoImprovement, match=r"run@20: held-out loss 1.10000 is not below.*promote.allow_worse"):
        promotion.require(museum[0], decide(museum))
    assert name(decide(museum, allow_worse=True)) == "run@20"


def test_the_page_shows_the_table_and_the_limits(museum: Museum, monkeypatch: pytest.MonkeyPatch) -> None:
    general = np.linspace(0.5, 1.0, 20)
    results = {
        0: {"held_out": losses(1.0), "general": general},
        10: {"held_out": losses(0.8), "general": general * 1.01, **FRESH},
        20: {"held_out": losses(0.7), "general": general * 1.4, **COPIED},
    }
    pretend(monkeypatch, results)
    settings, planned = museum
    strict = changed(settings, general_tolerance=0.02, measure_all=True)
    decision = Panel(strict, planned, promotion.candidates(strict, planned)).decide()
    where = explain.write(strict, planned, decision)
    page = Store(settings.root).read_bytes("reports/run/promotion.html").decode()
    assert where.endswith("reports/run/promotion.html")
    assert page.count("<svg") == 3  # loss, copies, general captions
    assert "general captions +40.0% against the base (at most +2.0%)" in page
    assert "<tr style=font-weight:bold><td>run@10" in page
    facts = Store(settings.root).read_json("reports/run/promotion.json")
    assert [row["copies"] for row in facts["checkpoints"]] == ["", "0% (0% to 9%)", "100% (91% to 100%)"]
    assert facts["best"] == "run@10"


def test_by_hand_and_back(museum: Museum) -> None:
    settings, _ = museum
    promotion.publish(settings, decide(museum), "evidence")
    with pytest.raises(NoCheckpoint, match=r"no checkpoint 'run@15': there are run@10, run@20"):
        promotion.by_hand(settings, "run@15")
    with pytest.raises(NoCheckpoint, match="a name is RUN@IMAGES"):
        promotion.by_hand(settings, "best")
    said = promotion.by_hand(settings, "run@20")
    assert said["evidence"] == "evidence"  # the scores are not asked again until there is something new
    store = Store(settings.root)
    assert checkpoints.read_best(store).images_seen == 20
    ledger.rollback(store)
    assert [(entry["kind"], entry["name"]) for entry in ledger.log(store)] == [
        ("rollback", "run@10"),
        ("hand", "run@20"),
        ("evidence", "run@10"),
    ]


def test_a_checkpoint_of_another_base_is_foreign(museum: Museum, capsys: pytest.CaptureFixture[str]) -> None:
    settings, planned = museum
    store = Store(settings.root)
    manifest = store.read_json("checkpoints/run/000000010/manifest.json")
    manifest["base"]["model"] = "somebody/else"
    store.write_json("checkpoints/run/000000010/manifest.json", manifest)
    assert [found.images_seen for found in promotion.candidates(settings, planned)] == [20]
    assert "run@10 belongs to another base (somebody/else)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="belongs to another base"):
        promotion.by_hand(settings, "run@10")


def test_without_a_checkpoint_the_train_job_is_named(museum: Museum) -> None:
    with pytest.raises(NoCheckpoint, match=r"checkpoints/run-1 holds no checkpoint: run the train job first"):
        promotion.candidates(museum[0], Plan("run-1", "encoder", ()))


def test_the_evidence_names_what_decides(museum: Museum) -> None:
    settings, _ = museum
    ten, twenty = (evidence(images, 1.0).checkpoint for images in (10, 20))
    assert ten is not None
    assert twenty is not None
    first = promotion.evidence_id(settings, [ten])
    faster = changed(settings, tasks=7, batch=3, gpus_per_task=1.0, cpus_per_task=4.0, measure_all=True)
    assert promotion.evidence_id(faster, [ten]) == first
    others = {
        promotion.evidence_id(settings, [ten, twenty]),
        promotion.evidence_id(settings, [twenty]),
        promotion.evidence_id(changed(settings, timesteps=3), [ten]),
        promotion.evidence_id(changed(settings, copy_rate=0.2), [ten]),
        promotion.evidence_id(changed(settings, alignment_model="miniature://blip"), [ten]),
    }
    votes.cast(Store(settings.root), [Vote("run@10", "run@20")])
    assert len({first, *others, promotion.evidence_id(settings, [ten])}) == 7
    assert config.Promote(general_pictures=0).general_pictures == 0


@pytest.mark.integration
def test_the_length_of_the_average_is_chosen_with_the_rest(
    museum: Museum, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A newest checkpoint that is worse than the base, and kept averages that are better: one of them is the best."""
    settings, planned = museum
    store, train = Store(settings.root), settings.train.model_copy(update={"power_ema": True})
    settings = changed(settings.model_copy(update={"train": train}), ema_lengths=(0.05, 0.1, 0.25))
    ten, twenty = promotion.candidates(settings, planned)
    good = {name: value.detach() for name, value in checkpoints.load_unet(store, ten).named_parameters()}
    newest = replace(twenty, training={"settings": train.model_dump(mode="json"), "losses": [[20, 1.0]]})
    store.write_json(f"{twenty.path}/manifest.json", asdict(newest))
    averages.write(store, twenty.path, {0.05: good, 0.1: {name: value + 0.01 for name, value in good.items()}})
    forget(store, ten)
    monkeypatch.setattr(runs, "plan", lambda _: planned)
    job.explain(settings)
    said = capsys.readouterr().out
    assert "run@20: an average of sigma_rel=0.25 made of 1 snapshots would be" in said
    assert [one.name for one in promotion.candidates(settings, planned)] == ["run@20", "run-ema0.050@20", "run-ema0.100@20"]
    facts = store.read_json("reports/run/promotion.json")
    assert facts["best"] == "run-ema0.050@20"
    lines = " ".join(said.split())
    assert "Lengths of the average at 20 images (sigma_rel: held-out loss): 0.05: " in lines
    assert "Best: 0.05" in lines
    page = store.read_bytes("reports/run/promotion.html").decode()
    assert "Lengths of the average at 20 images" in page
    assert not store.exists("refs/best")
    decision = decide((settings, planned))
    said_by = promotion.publish(settings, decision, "evidence")
    assert said_by["scores"]["ema_length"] == 0.05
    assert [seen for seen, _ in said_by["scores"]["heldout_curve"]] == [0, 20]
    assert checkpoints.read_best(store).training["average"]["sigma_rel"] == 0.05
