"""Weights & Biases and TensorBoard: metrics, pictures and the promoted model. Never in the way of the work.

W&B is offline without a key, and goes on offline where its server does not answer: `wandb sync` brings the files there later,
from <root>/wandb, or where the root is a bucket from <root>/wandb/<run>, which is written when the job ends; and so
what an online run could not send. W&B writes down where on this machine the files of pictures and models are staged: so they lie
beside the run, and are brought back to that place.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image

from momalisa.config import Settings
from momalisa.redaction import redacted
from momalisa.storage import Store

STAGING = "WANDB_DATA_DIR"  # where W&B looks for the folder in which it stages files
FINISH_S = 60.0  # for uploads at the end; what is not done by then stays on disk for `wandb sync`
FLUSH_S = 5.0  # what a killed process has not written to disk yet
UPLOAD_BYTES_PER_S = 1e7  # and for a model as long as it takes at this speed: 3.4 GB are sent in 6 minutes
RETRIES = 1_000_000  # a minute apart, as long as the run goes: what W&B gives up it forgets
EVALUATION = "evaluation"


def mode(settings: Settings) -> str:
    """online, offline or disabled: `auto` is online when WANDB_API_KEY is set."""
    if settings.wandb.mode != "auto":
        return settings.wandb.mode
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


class Tracker:
    """One run in W&B, TensorBoard, or both; the same run id goes on where a killed run stopped.

    What either of them cannot do is said once and costs the work nothing.
    """

    def __init__(self, settings: Settings, run_id: str, job: str) -> None:
        self._said: set[str] = set()
        self._wandb = self._attempt("W&B", lambda: WandbRun(settings, run_id, job))
        self._board: Any = Board(settings, run_id) if settings.wandb.tensorboard else None

    def _attempt(self, where: str, operation: Callable[[], Any]) -> Any:
        """What it returns; None, and one message, where it fails."""
        try:
            return operation()
        except Exception as error:  # of a service that only looks on
            if where not in self._said:
                self._said.add(where)
                print(f"{where} cannot follow: {type(error).__name__}: {error}; going on without", flush=True)
            return None

    def log(self, metrics: dict[str, float]) -> None:
        """Metrics by name; `images_seen` among them is the horizontal axis."""
        if self._wandb is not None:
            self._attempt("W&B", lambda: self._wandb.log(metrics))
        if self._board is not None:
            self._attempt("TensorBoard", lambda: self._board.log(metrics))

    def pictures(self, images_seen: int, prompts: Sequence[str], seeds: Sequence[int], pictures: Sequence[Image.Image]) -> None:
        """The evaluation prompts' pictures at a point of the run."""
        if self._wandb is not None:
            self._attempt("W&B", lambda: self._wandb.pictures(images_seen, prompts, seeds, pictures))
        if self._board is not None:
            self._attempt("TensorBoard", lambda: self._board.pictures(images_seen, prompts, pictures))

    def dataset(self, version: str | None) -> None:
        """Say which version of the collection this run is made from: the first link of the lineage."""
        if self._wandb is not None and version:
            self._attempt("W&B", lambda: self._wandb.dataset(version))

    def artifact(self, name: str, directory: Path, metadata: dict[str, Any], alias: str) -> None:
        """Log a folder as a model artifact under an alias."""
        if self._wandb is not None:
            self._attempt("W&B", lambda: self._wandb.artifact(name, directory, metadata, alias))

    def finish(self) -> None:
        if self._wandb is not None:
            self._attempt("W&B", self._wandb.finish)
        if self._board is not None:
            self._attempt("TensorBoard", self._board.finish)


class WandbRun:
    """A run in W&B; its files lie below the root, or for a bucket in a folder of this machine until the run has finished."""

    def __init__(self, settings: Settings, run_id: str, job: str) -> None:
        import wandb

        self._bucket = Store(settings.root) if "://" in settings.root else None
        self.directory = Path(tempfile.mkdtemp(prefix="momalisa-wandb-") if self._bucket else settings.root).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._wandb, self._settings, self._patience_s = wandb, settings, FINISH_S
        self._service: Any = None  # W&B's own process, where it talks to a server
        self._finishing, self._finished, self._late, self._ending = *(threading.Event() for _ in range(3)), threading.Lock()
        self._begin: dict[str, Any] = {
            "project": settings.wandb.project,
            "id": f"{run_id}-{job}",
            "name": run_id,
            "job_type": job,
            "dir": str(self.directory),
            "resume": "allow",
            "config": redacted(settings.model_dump(mode="json")),
        }
        os.environ.pop("WANDB_SERVICE", None)  # of another program, which may end before this one
        beside = mode(settings) != "disabled"
        self._staged_before = stage(str(self.directory / "wandb") if beside else os.environ.get(STAGING))
        try:
            self._run = self._init(mode(settings))
            self._run.define_metric("images_seen")
            self._run.define_metric("*", step_metric="images_seen")
        except BaseException:
            stage(self._staged_before)
            if self._bucket is not None:
                wandb.teardown()
                shutil.rmtree(self.directory)
            raise

    def _init(self, how: str) -> Any:
        options = self._wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_meta=True,  # the command line may name a source with its password
            init_timeout=self._settings.wandb.connect_timeout_s,
            login_timeout=self._settings.wandb.connect_timeout_s,
            x_transaction_log_flush_interval=FLUSH_S,
            x_graphql_retry_max=RETRIES,
            x_file_stream_retry_max=RETRIES,
            x_file_transfer_retry_max=RETRIES,
        )
        try:
            run: Any = self._wandb.init(**self._begin, mode=cast("Any", how), settings=options)
            if how == "online":
                run._log_artifact = self._record
                connection: Any = self._wandb.setup().ensure_service()
                self._service = connection._proc._process
                threading.Thread(target=self._end_in_time, daemon=True).start()
                atexit.register(self._sent)  # of a run that nobody finishes, too, W&B would wait for its server
            return run
        except Exception as error:
            if how != "online":
                raise
            server = os.environ.get("WANDB_BASE_URL", "its server")
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            later = "" if self._bucket else f", bring the run there later with `wandb sync {self.directory}/wandb/offline-run-*`"
            print(f"W&B: {server} cannot be used ({reason}); going on offline{later}", flush=True)
            self._wandb.teardown()
            return self._init("offline")

    def _record(
        self, artifact: Any, *, aliases: Any = None, is_user_created: bool = False, use_after_commit: bool = False, **_: Any
    ) -> Any:
        """Log an artifact online as W&B does offline: it is written to disk, and sent when the server answers.

        W&B's own way asks the server first, waits for it, and leaves nothing on disk for `wandb sync`.
        """
        artifact, aliases = self._run._prepare_artifact(artifact, aliases=aliases)
        self._run._interface.publish_artifact(
            self._run, artifact, aliases, is_user_created=is_user_created, use_after_commit=use_after_commit
        )
        return artifact

    def log(self, metrics: dict[str, float]) -> None:
        self._run.log(metrics)

    def pictures(self, images_seen: int, prompts: Sequence[str], seeds: Sequence[int], pictures: Sequence[Image.Image]) -> None:
        table = self._wandb.Table(columns=["images_seen", "prompt", "seed", "picture"])
        for prompt, seed, picture in zip(prompts, seeds, pictures, strict=True):
            table.add_data(images_seen, prompt, seed, self._wandb.Image(picture))
        self._run.log({EVALUATION: table, "images_seen": images_seen})

    def dataset(self, version: str) -> None:
        """An artifact that stands for a version (its id; the pictures stay where they are), used by this run."""
        artifact = self._wandb.Artifact(f"{self._settings.name}-dataset", type="dataset", metadata={"version": version})
        with artifact.new_file("version.txt") as file:
            file.write(f"{redacted(self._settings.dataset)} {version}\n")
        self._run.config.update({"dataset_version": version}, allow_val_change=True)
        self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)  # `use_artifact` waits for the server

    def artifact(self, name: str, directory: Path, metadata: dict[str, Any], alias: str) -> None:
        artifact = self._wandb.Artifact(name, type="model", metadata=metadata)
        artifact.add_dir(str(directory))
        self._patience_s += artifact.size / UPLOAD_BYTES_PER_S
        self._run.log_artifact(artifact, aliases=[alias, "latest"])

    def finish(self) -> None:
        """Raises TimeoutError where an online run's uploads take too long: all of it stays on disk, or in the bucket."""
        kept, folder = self._run.offline, Path(self._run.dir).parent
        atexit.unregister(self._sent)
        try:
            sent = self._sent()
        finally:
            stage(self._staged_before)
        later = f"wandb sync {folder}" if kept else f"wandb sync --include-online {folder}"
        if self._bucket is not None:
            self._wandb.teardown()  # W&B's own process writes its last lines when it ends
            if kept or not sent:
                later = self._carry(self._bucket, later)
            shutil.rmtree(self.directory)
        if not sent:
            raise TimeoutError(
                f"not all of the run was sent, with {self._patience_s:.0f} s at the end for it: bring it to the server later "
                f"with `{later}`"
            )

    def _sent(self) -> bool:
        """Finish the run; False where W&B's own process, which would wait for the server, has ended: all is on disk by then."""
        self._finishing.set()
        try:
            self._run.finish()
        except Exception:
            if self._service is None or (self._service.poll() is None and not self._late.is_set()):
                raise
        finally:
            with self._ending:
                self._finished.set()
        if self._service is None or (self._service.poll() is None and not self._late.is_set()):
            return True
        self._service.wait()
        with contextlib.suppress(Exception):  # it cannot say goodbye
            self._wandb.teardown()
        return False

    def _end_in_time(self) -> None:
        """End W&B's process where finishing takes too long; in a thread from the start: at a program's exit none can begin."""
        self._finishing.wait()
        self._finished.wait(self._patience_s)
        with self._ending:
            if not self._finished.is_set():
                self._late.set()
                self._service.kill()

    def _carry(self, bucket: Store, later: str) -> str:
        """Bring a run, and what it has staged, from this machine to <root>/wandb/<run>/<its folder here>; say how it goes on."""
        folder, here = f"wandb/{self._begin['name']}/{self.directory.name}", self.directory.parent
        for part in (self.directory / "wandb").iterdir():
            if part.is_dir() and not part.is_symlink():  # W&B's links say which run is the latest
                bucket.upload(part, f"{folder}/wandb/{part.name}")
        how = f"mkdir -p {here} && gcloud storage cp -r {bucket.url(folder)} {here} && {later}"
        bucket.write_bytes(f"{folder}/README", f"`{how}`\n".encode())
        print(f"W&B: this run is in {bucket.url(folder)}; bring it to the server with `{how}`", flush=True)
        return how


def stage(folder: str | None) -> str | None:
    """Have W&B stage files in a folder (None: where it does by itself); returns where it did before."""
    before = os.environ.pop(STAGING, None)
    os.environ |= {STAGING: folder} if folder is not None else {}
    return before


class Board:
    """TensorBoard's event files in <root>/tensorboard/<run>. Raises ValueError where the package is missing."""

    def __init__(self, settings: Settings, run_id: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "wandb.tensorboard needs the tensorboard package: pip install 'momalisa[tensorboard]', or set it to false"
            ) from error
        self._writer: Any = SummaryWriter(f"{settings.root.rstrip('/')}/tensorboard/{run_id}")

    def log(self, metrics: dict[str, float]) -> None:
        seen = int(metrics["images_seen"])
        for name, value in metrics.items():
            if name != "images_seen":
                self._writer.add_scalar(name, value, seen)
        self._writer.flush()

    def pictures(self, images_seen: int, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> None:
        import numpy as np

        for prompt, picture in zip(prompts, pictures, strict=True):
            self._writer.add_image(prompt, np.asarray(picture.convert("RGB")), images_seen, dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()
