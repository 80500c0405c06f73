"""What trying again does not mend ends a job at once, with a message for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from momalisa.config import Settings
from ray_jobs import train
from tests.integration.test_elastic import arguments, settings_of


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
