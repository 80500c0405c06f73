"""All settings: frozen, validated, the same for every job and for the server. Imports nothing heavy.

A YAML file gives them, `--train.images=20000` on the command line overrides them, and an unknown key or a wrong
value is an error that names the field. `python -m ray_jobs.train --config configs/demo.yaml --dry-run` prints the
result.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from momalisa.config.cluster import Cluster
from momalisa.config.data import AIC_API, Caption, Collect, Encode, Source
from momalisa.config.section import EVALUATION_PROMPTS, Section
from momalisa.config.serving import Serve
from momalisa.config.training import Diffusion, Promote, Train, Wandb

__all__ = [
    "AIC_API", "EVALUATION_PROMPTS", "Caption", "Cluster", "Collect", "ConfigError", "Diffusion", "Encode", "Promote", "Section",
    "Serve", "Settings", "Source", "Train", "Wandb", "command_line", "from_file",
]  # fmt: skip

SHORT_OPTIONS = {"--refresh": "--collect.refresh=true", "--retry-failed": "--collect.retry_failed=true"}


class Settings(BaseSettings):
    """One file for the whole way: collect, caption, encode, train, promote, serve."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(default="momalisa", pattern=r"^[a-z0-9][a-z0-9-]*$")
    """The run's name: its checkpoints and its W&B run."""
    root: str = "out/momalisa"
    """A folder or gs://bucket/prefix that holds dataset, checkpoints and refs."""
    ray_cpus_per_task: float = Field(default=1, gt=0)
    diffusion: Diffusion = Diffusion()
    collect: Collect = Collect()
    caption: Caption = Caption()
    encode: Encode = Encode()
    train: Train = Train()
    promote: Promote = Promote()
    serve: Serve = Serve()
    wandb: Wandb = Wandb()
    cluster: Cluster = Cluster()

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # the environment and its files are not asked
        cls, settings_cls: Any, init_settings: Any, **_: Any
    ) -> tuple[Any, ...]:
        return (init_settings,)

    @model_validator(mode="after")
    def _long_captions(self) -> Settings:
        if self.encode.caption == "long" and self.caption.long_model is None:
            raise ValueError("encode.caption=long needs caption.long_model; try florence-community/Florence-2-base, or fused")
        return self

    @model_validator(mode="after")
    def _mirror_images(self) -> Settings:
        if self.train.flip and not self.encode.mirrored:
            raise ValueError(
                "train.flip=true needs encode.mirrored=true: a mirror image has latents of its own. Set it, and run the encode "
                "job again with it: python -m ray_jobs.encode --config ..."
            )
        return self

    @property
    def dataset(self) -> str:
        return f"{self.root.rstrip('/')}/dataset"


class ConfigError(ValueError):
    """A setting that cannot be: the message names the file, the field, the value and the way out."""


def from_file(path: str, overrides: list[str] | None = None) -> Settings:
    """Read a YAML file, apply `--section.field=value` overrides, validate. Raises ConfigError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}; configs/ holds examples") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no text, or no such date
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `section:` entries at the top, found {type(values).__name__}")
    return _build(values, overrides or [], path)


def _build(values: dict[str, Any], overrides: list[str], origin: str) -> Settings:
    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: Any, init_settings: Any, **_: Any
        ) -> tuple[Any, ...]:
            command_line: CliSettingsSource[Any] = CliSettingsSource(
                settings_cls, cli_parse_args=overrides, cli_exit_on_error=False, cli_prog_name=origin
            )
            return (command_line, init_settings)

    try:
        merged = Sourced(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        raise ConfigError("\n".join(_problem(origin, item) for item in error.errors())) from None
    except (SettingsError, argparse.ArgumentError) as error:
        raise ConfigError(f"{origin} {' '.join(overrides)}: {error}") from None
    return Settings.model_construct(**{name: getattr(merged, name) for name in Settings.model_fields})


def _problem(origin: str, item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{origin}: {field} is not a setting; known ones here: {', '.join(_siblings(item['loc']))}"
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    where = f"{origin}: {field}" if field else origin  # a rule about several sections names them itself
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{given}"


def _siblings(location: tuple[Any, ...]) -> list[str]:
    model: Any = Settings
    for part in location[:-1]:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def command_line(doc: str | None, module: str, arguments: list[str] | None = None) -> Settings:
    """What every job begins with: parse, print and exit on `--help` or `--dry-run`, exit 2 on a wrong setting."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        epilog="Any setting can follow: --section.field=value. `--dry-run` prints them all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="the settings, for example configs/demo.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")
    options, overrides = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    overrides = [SHORT_OPTIONS.get(option, option) for option in overrides]
    try:
        settings = from_file(options.config, overrides)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    if options.dry_run:
        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
        parser.exit(0)
    return settings
