"""The train job through Ray: any number of workers train the same, and what trying again does not mend ends it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from momalisa.config import Settings
from ray_jobs import train
from tests import audit
from tests.integration.test_elastic import TRAINED_ON, arguments, settings_of


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e8, "checkpoint_every_images": 100_000}, r"the (loss|norm of the gradient) is .*the last checkpoint"),
        ({"zero_terminal_snr": True, "min_snr_gamma": "null"}, r"train.zero_terminal_snr: .* predicts 'epsilon'"),
    ],
    ids=["diverges", "cannot be"],
)
def test_what_would_be_the_same_each_time_is_tried_once(
    tiny_base: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    listed = [*arguments(tiny_base, tmp_path, workers=2, images=1600, max_failures=2, **changes), "--wandb.tensorboard=true"]
    settings: Settings = settings_of(listed)
    with pytest.raises(ValueError, match=message) as caught:
        train.run(settings)
    assert "Traceback" not in str(caught.value)
    assert len(list(tmp_path.glob("tensorboard/*/events*"))) == 1  # one for each attempt


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_two_hundred_steps_are_the_same_at_one_two_and_four_workers(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, tolerance: float
) -> None:
    """The audit: the same samples in the same steps, each work once an epoch; and the same losses."""
    monkeypatch.setattr(train, "train_worker", audit.train_worker)
    size = {"images": 1600, "batch": 8, "cell": 2, "checkpoint_every_images": 1600, "cpus_per_worker": 0.25}
    losses: dict[int, dict[int, float]] = {}
    batches: dict[int, dict[int, list[audit.Drawn]]] = {}
    for workers in (1, 2, 4):
        root = tmp_path / f"workers-{workers}"
        settings = settings_of(arguments(tiny_base, root, workers=workers, precision=precision, **size))
        losses[workers] = dict(train.run(settings)["losses"])
        batches[workers] = audit.steps(root)
    assert list(batches[1]) == list(range(0, 1600, 8))
    audit.check_epochs(batches[1], TRAINED_ON)
    for workers in (2, 4):
        assert batches[workers] == batches[1]
        assert losses[workers] == pytest.approx(losses[1], rel=tolerance)
    assert list(losses[1]) == list(range(80, 1601, 80))
