"""Settings: every file parses, every mistake is named, nothing leaks in, and nothing heavy is imported to read them."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from momalisa.config import ConfigError, Settings, Train, command_line, from_file

HOME = Path(__file__).parents[1]
CONFIGS = sorted((HOME / "configs").glob("*.yaml"))
JOBS = sorted(path.stem for path in (HOME / "ray_jobs").glob("[a-z]*.py"))


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return str(path)


def embedded(path: Path) -> list[Path]:
    """The settings files that a deployment manifest names: `config: configs/....yaml`, or `--config configs/....yaml`."""
    return [HOME / name for name in re.findall(r"config:? +[\"']?(configs/[\w.-]+\.yaml)", path.read_text())]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_parses(path: Path) -> None:
    assert from_file(str(path)).root


def test_every_manifest_names_configurations_that_are_there() -> None:
    manifests = [*HOME.glob("*.yaml"), *(HOME / "deploy").rglob("*.yaml"), *(HOME / "serve").glob("*.yaml")]
    named = {config for manifest in manifests for config in embedded(manifest)}
    assert named <= set(CONFIGS)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert from_file(written(tmp_path, "")).model_dump() == Settings().model_dump()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tarin: {}", ["tarin is not a setting", "train", "collect"]),
        ("train: {imagez: 3}", ["train.imagez is not a setting", "images", "learning_rate"]),
        ("collect: {source: {path: x}}", ["collect.source.path is not a setting", "location"]),
        ("train: {images: many}", ["train.images", "integer", "'many'"]),
        ("train: {images: 0}", ["train.images", "greater than or equal to 1", "0"]),
        ("train: 3", ["train", "3"]),
        ("train: {precision: int8}", ["train.precision", "'fp32', 'bf16' or 'fp16'", "'int8'"]),
        ("train: {held_out_fraction: 1.0}", ["train.held_out_fraction", "less than 1"]),
        ("train: {learning_rate: -1}", ["train.learning_rate", "greater than 0"]),
        ("collect: {source: {kind: louvre}}", ["collect.source.kind", "'moma', 'folder' or 'aic'", "'louvre'"]),
        ("name: Demo Run", ["name", "pattern", "'Demo Run'"]),
        ("train: {batch: 10, cell: 4}", ["train", "batch=10", "not a multiple of cell=4", "try 8 or 12"]),
        ("train: {batch: 8, cell: 4, workers: 3}", ["batch=8 makes 2 cells of 4", "workers=3", "try batch=12 or cell=2"]),
        ("train: {workers: 2, min_workers: 3}", ["min_workers=3 is more than workers=2", "try 2"]),
        ("encode: {resolution_px: 100}", ["encode", "resolution_px=100 is not a multiple of 8", "try 104"]),
        ("train: {flip: true}", ["train.flip=true", "encode.mirrored=true", "python -m ray_jobs.encode --config"]),
        ("- train\n- encode", ["expected `section:` entries", "list"]),
        ("just words", ["expected `section:` entries", "str"]),
        ("train: [unclosed", ["is not YAML"]),
        ("name: 2020-13-45", ["is not YAML", "month"]),
        ("1: 2", ["1 is not a setting"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_way_out(tmp_path: Path, text: str, said: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        from_file(path)
    for part in [path, *said]:
        assert part in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(written(tmp_path, "train: {images: many}\nserve: {steps: 0}"))
    assert "train.images" in str(caught.value)
    assert "serve.steps" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: No such file.*configs/"):
        from_file(str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        from_file(str(tmp_path))


def test_bytes_that_are_no_text_are_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not YAML"):
        from_file(str(path))


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 500) | st.floats(allow_nan=False) | st.text(max_size=8) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*Settings.model_fields, "images", "source", "batch"]) | st.integers(), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 200), cell=st.none() | st.integers(1, 12), workers=st.integers(1, 40))
def test_a_batch_that_cannot_be_is_answered_with_some_that_can(batch: int, cell: int | None, workers: int) -> None:
    chosen: dict[str, Any] = {"batch": batch, "cell": cell, "workers": workers}
    try:
        Train(**chosen)
    except ValidationError as error:
        for one in error.errors()[0]["msg"].split("; try ")[1].split(" or "):
            name, _, value = one.rpartition("=")
            Train(**{**chosen, name or "batch": int(value)})


@given(value=yaml_values)
def test_any_yaml_is_settings_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = written(tmp_path_factory.getbasetemp(), yaml.safe_dump(value, allow_unicode=True))
    with contextlib.suppress(ConfigError):
        assert isinstance(from_file(path), Settings)


def test_overrides_beat_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "name: first\ntrain: {images: 5, batch: 4, schedule: cosine}")
    overrides = ["--name=second", "--train.images=7", "--train.gradient_checkpointing=true", "--collect.source.limit", "9"]
    found = from_file(path, overrides)
    assert (found.name, found.train.images, found.train.gradient_checkpointing, found.collect.source.limit) == (
        "second",
        7,
        True,
        9,
    )
    assert (found.train.batch, found.train.schedule) == (4, "cosine")  # the rest of the section stays


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--train.images=many", "train.images"),
        ("--train.imagez=3", "train.imagez"),
        ("--encode.resolution_px=100", "try 104"),
        ("stray", "stray"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_file(written(tmp_path, ""), [override])


def test_some_options_have_a_short_spelling() -> None:
    config = str(HOME / "configs" / "demo.yaml")
    made = command_line("", "ray_jobs.collect", ["--config", config, "--retry-failed", "--train.images=64"])
    assert (made.collect.retry_failed, made.collect.refresh, made.train.images) == (True, False, 64)
    assert command_line("", "ray_jobs.collect", ["--config", config, "--refresh"]).collect.refresh
    choice = ['--collect.source.departments=["Film", "Drawings & Prints"]']
    assert from_file(config, choice).collect.source.departments == ("Film", "Drawings & Prints")


def test_settings_and_their_sections_are_frozen() -> None:
    made = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        made.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        made.train.images = 3


def test_the_environment_does_not_leak_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = from_file(str(HOME / "configs" / "demo.yaml")).model_dump()
    for name, value in {"NAME": "DESKTOP-7", "ROOT": "/", "TRAIN": '{"images": 1}', "WANDB": "{}", "serve": "no"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".env").write_text("NAME=leak\n")
    monkeypatch.chdir(tmp_path)
    assert from_file(str(HOME / "configs" / "demo.yaml")).model_dump() == expected
    assert Settings().name == "momalisa"
    assert Settings(name="mine").root == "out/momalisa"


def test_settings_travel_to_workers(tmp_path: Path) -> None:
    made = from_file(written(tmp_path, "train: {images: 5}"), ["--root=gs://bucket/moma/"])
    assert pickle.loads(pickle.dumps(made)) == made
    assert made.dataset == "gs://bucket/moma/dataset"


WATCH = """
import contextlib, io, json, runpy, sys
from pathlib import Path
found = {}
for job in sys.argv[1].split(","):
    for flags in (["--help"], ["--config", "configs/demo.yaml", "--train.images=64", "--dry-run"]):
        sys.argv = ["job", *flags]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                runpy.run_module(f"ray_jobs.{job}", run_name="__main__")
                code = "ran on"
            except SystemExit as end:
                code = end.code
        heavy = sorted({"torch", "ray", "diffusers", "transformers", "pyarrow", "wandb"} & set(sys.modules))
        found[f"{job} {flags[-1]}"] = [code, heavy, out.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, list[str], str]]:
    """What every job says to --help and to --dry-run, and the heavy modules that had been imported by then."""
    command = [sys.executable, "-c", WATCH, ",".join(JOBS)]
    result = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout))


def test_jobs_are_found() -> None:
    assert {"train", "promote", "pipeline"} <= set(JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_help_and_dry_run_are_light(answers: dict[str, tuple[int, list[str], str]], job: str) -> None:
    for flag in ("--help", "--dry-run"):
        code, heavy, _ = answers[f"{job} {flag}"]
        assert (code, heavy) == (0, []), flag
    assert f"python -m ray_jobs.{job} --config" in answers[f"{job} --help"][2]


@pytest.mark.parametrize("job", JOBS)
def test_dry_run_prints_what_parses_back(answers: dict[str, tuple[int, list[str], str]], job: str, tmp_path: Path) -> None:
    printed = answers[f"{job} --dry-run"][2]
    again = from_file(written(tmp_path, printed))
    assert again.train.images == 64
    assert again == from_file(str(HOME / "configs" / "demo.yaml"), ["--train.images=64"])


def test_a_job_exits_2_on_a_wrong_setting() -> None:
    command = [sys.executable, "-m", "ray_jobs.train", "--config", "configs/demo.yaml", "--train.cell=3"]
    result = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "batch=32 is not a multiple of cell=3; try 30 or 33" in result.stderr
    assert "Traceback" not in result.stderr
