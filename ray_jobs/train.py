"""train: fine-tune the base model on the encoded works, with DDP workers under Ray Train.

    python -m ray_jobs.train --config configs/demo.yaml [--train.images=20000 ...]
    ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.train --config configs/sd14.yaml

The same settings name the same run: started again, it goes on from its last checkpoint, and when it is complete it
says so. W&B follows it (offline without WANDB_API_KEY); pictures of the evaluation prompts go to reports/<run>/.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from momalisa.config import Settings
from ray_jobs._job import job

if TYPE_CHECKING:
    from momalisa.training.run import Plan


PATIENCE_S = 4 * 3600
"""How long workers wait for the first one, which alone writes checkpoints, draws pictures and measures losses for an early stop:
minutes for each checkpoint of Stable Diffusion's size, and where a run is given its patience late, for all of them at once."""


def run(settings: Settings) -> dict[str, Any]:
    """Train to the end and return the stage's summary."""
    from momalisa.checkpoint import read_all
    from momalisa.storage import Store
    from momalisa.training import run as runs

    began = time.monotonic()
    planned, store = runs.plan(settings), Store(settings.root)
    if settings.train.split_by == "artist":
        share = len(planned.held_out) / planned.works
        print(f"train: {share:.1%} of {planned.works} works are held out (train.held_out_fraction, as whole artists allow)")
    before = read_all(store, planned.name)
    seen = before[-1].images_seen if before else 0
    new = not runs.complete(settings, before)
    if new:
        fit(settings, planned)
        before = read_all(store, planned.name)
        if runs.plan(settings).name != planned.name:
            print("train: the dataset has changed since this run began: it knew the works and captions of then; train again")
    else:
        early = "; it stopped early, and goes on without train.early_stop_patience" if seen < settings.train.images else ""
        print(f"train: nothing new (run {planned.name} has seen its {seen} images{early})")
    return {
        "stage": "train",
        "run": planned.name,
        "rows_in": planned.works,
        "rows_out": len(before),
        "rejected": 0,
        "held_out": len(planned.held_out),
        "images_seen": before[-1].images_seen,
        "resumed_from": seen if new else None,
        "losses": before[-1].training["losses"],
        "new": int(new),
        "seconds": (seconds := time.monotonic() - began),
        "rows_per_s": (before[-1].images_seen - seen) / seconds,
    }


def fit(settings: Settings, planned: Plan) -> None:
    """Run Ray Train's workers over the library's loop. Raises ValueError for what trying again would not mend."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from momalisa.storage import Store
    from ray_jobs._cluster import connect
    from ray_jobs._ending import stoppable

    connect()
    chosen = settings.train
    resources = {"CPU": chosen.cpus_per_worker} | ({"GPU": chosen.gpus_per_worker} if chosen.gpus_per_worker else {})
    size: dict[str, Any] = {"num_workers": chosen.workers}
    if chosen.min_workers:
        size = {"num_workers": (chosen.min_workers, chosen.workers), "elastic_resize_monitor_interval_s": chosen.resize_check_s}
    with stoppable() as bell:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"settings": settings, "plan": planned, "bell": bell},
            torch_config=TorchConfig(timeout_s=PATIENCE_S),
            scaling_config=ScalingConfig(use_gpu=chosen.gpus_per_worker > 0, resources_per_worker=resources, **size),
            run_config=RunConfig(
                name=planned.name,
                storage_path=Store(settings.root).url("ray_train"),
                failure_config=FailureConfig(max_failures=chosen.max_failures),
            ),
        )
        failure = None
        try:
            trainer.fit()
        except TrainingFailedError as error:
            failure = error
        if hopeless := ray.get(bell.hopeless.remote()):
            said, where = hopeless
            raise ValueError(said) from RuntimeError(where)
        if failure is not None:
            raise failure


def train_worker(config: dict[str, Any]) -> None:
    """One DDP worker. What would be the same each time ends the job; what might not be is tried again."""
    import ray.train

    from momalisa.training.loop import Diverged
    from ray_jobs._ending import give_up

    bell, context = config["bell"], ray.train.get_context()
    if ray.get(bell.hopeless.remote()):
        return
    try:
        train(config["settings"], config["plan"], bell)
    except (Diverged, ValueError) as error:
        passing = isinstance(error, OSError)  # a storage that could not be reached
        if passing or not give_up(bell, context.get_world_rank(), context.get_world_size(), error):
            raise


def train(settings: Settings, planned: Plan, bell: Any) -> None:
    """The library's trainer in this worker, with Ray and W&B listening."""
    import ray.train
    import torch

    from momalisa.training import run as runs
    from momalisa.training.loop import Interrupted, Trainer
    from momalisa.training.processes import determinism
    from momalisa.training.watch import watch
    from ray_jobs._ending import begin, following, listening
    from ray_jobs._metrics import exporter

    context = ray.train.get_context()
    torch.set_num_threads(settings.train.threads or max(1, int(settings.train.cpus_per_worker)))
    main = context.get_world_rank() == 0
    watching = watch(settings, planned, main, following(bell, exporter(planned.name)))
    with determinism(settings.train.deterministic), watching as events, listening(bell) as events.ending:
        events.synchronise = ray.train.report
        trainer = Trainer(runs.load(settings, planned), events, workers=context.get_world_size())
        if main:
            begin(bell, trainer.progress.images_seen)
        try:
            trainer.train()
        except Interrupted as interrupted:
            ray.get(bell.leave.remote(str(interrupted)))  # by each: the first that ends may take the others along
            raise


def main() -> None:
    job(
        __doc__,
        "train",
        run,
        lambda done: f"{done['images_seen']} images seen, {done['rows_out']} checkpoints, {done['seconds']:.0f} s",
    )


if __name__ == "__main__":
    main()
