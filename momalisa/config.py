"""All settings: frozen, validated, the same for every job and for the server. Imports nothing heavy.

A YAML file gives them, `--train.images=20000` on the command line overrides them, and an unknown key or a wrong
value is an error that names the field. `python -m ray_jobs.train --config configs/demo.yaml --dry-run` prints the
result.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

EVALUATION_PROMPTS = (
    "A MOMA artwork of: changing seasons",
    "A MOMA artwork of: a coffee",
    "A MOMA artwork of: an industrial setting",
    "A MOMA artwork of: critique of the USA",
    "A MOMA artwork of: Picasso and Monet",
)


AIC_API = "https://api.artic.edu/api/v1"
SHORT_OPTIONS = {"--refresh": "--collect.refresh=true", "--retry-failed": "--collect.retry_failed=true"}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Source(Section):
    """Where the artworks are."""

    kind: Literal["moma", "folder", "aic"] = "moma"
    """`moma`: a collection file in MoMA's CSV schema; `folder`: a folder or gs:// prefix of pictures; `aic`: the public
    domain works of the Art Institute of Chicago, through its API."""
    location: str = "http://127.0.0.1:8930/collection.csv"
    """A URL or path of the collection file; or the folder or gs:// prefix; for `aic` https://api.artic.edu/api/v1."""
    on_view_only: bool = True
    """moma, aic: only works on display now."""
    departments: tuple[str, ...] = ()
    """Only works of these departments, as the source spells them, e.g. '["Drawings & Prints"]'; empty: of all."""
    classifications: tuple[str, ...] = ()
    """Only works of these classifications, e.g. '["Painting"]'; empty: of all."""
    limit: Positive | None = None
    """Stop after so many works."""

    @model_validator(mode="before")
    @classmethod
    def _address_of_the_api(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "aic":
            return {"location": AIC_API, **values}
        return values


class Collect(Section):
    """collect: a source's pictures -> clean pictures in the dataset."""

    source: Source = Source()
    max_side_px: Positive = 1024
    """Pictures are scaled down to this; 512x512 training wants no more."""
    max_pixels: Positive = 120_000_000
    """More in the file's header than this is a decompression bomb."""
    min_side_px: Positive = 8
    """A picture with a shorter side is a placeholder, not a work."""
    max_bytes: Positive = 50_000_000
    matte: str = Field(default="#ffffff", pattern="^#[0-9a-fA-F]{6}$")
    """What is put behind transparent pictures."""
    animated: Literal["first_frame", "reject"] = "first_frame"
    """Animations and files of several pages: take the first picture, or none."""
    duplicates: Literal["drop", "keep"] = "drop"
    """drop: a picture that the dataset has already, or has larger, is passed by from captioning on; its row stays."""
    tasks: Positive = 2
    """Download tasks at a time."""
    per_host: Positive = 4
    """Connections to one host at a time, over all tasks."""
    requests_per_second: float = Field(default=10.0, gt=0)
    """Requests to one host in a second, over all tasks. A longer Crawl-delay in its robots.txt holds instead."""
    obey_robots: bool = True
    """Leave alone what robots.txt or `X-Robots-Tag: noai` forbid. false: only for a site that is your own."""
    timeout_s: float = Field(default=30.0, gt=0)
    attempts: Positive = 4
    allow_private_addresses: bool = False
    """Fetch from loopback and private networks too (the miniature museum is there)."""
    user_agent: str = Field(default="momalisa/0.1 (art collection research; see README)", pattern="^[A-Za-z_-]+")
    """Name, version and a way to reach you. Its first word is the name that robots.txt may address."""
    refresh: bool = False
    """Ask again for the pictures of known works, and replace those that have changed. --refresh"""
    retry_failed: bool = False
    """Ask again for the works that were rejected, and for no others. --retry-failed"""
    max_bad_fraction: Fraction = 0.5
    """Fail when more of the works than this were rejected."""
    block_size: Positive = 64
    """Works in one task and one Parquet file."""


class Caption(Section):
    """caption: pictures -> texts, by BLIP, and longer ones by Florence-2."""

    model: str = "Salesforce/blip-image-captioning-base"
    revision: str | None = None
    prefix: str = "A MOMA artwork of: "
    max_new_tokens: Positive = 40
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of both captioners: fp16 on a GPU; bf16 is the fastest on a CPU that has AMX."""
    long_model: str | None = None
    """A second captioner for detailed texts, such as florence-community/Florence-2-base; none by default."""
    long_revision: str | None = None
    long_prompt: Literal["<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"] = "<DETAILED_CAPTION>"
    long_max_new_tokens: Positive = 128
    batch: Positive = 16
    actors: Positive = 1
    cpus_per_actor: float = Field(default=1, gt=0)
    gpus_per_actor: float = Field(default=0, ge=0)
    cpus_per_decoder: float = Field(default=0.5, ge=0)
    """What each task that decodes pictures reserves; nothing where the actors take every CPU that there is."""
    max_bad_fraction: Fraction = 0.05


class Encode(Section):
    """encode: pictures -> latent moments, captions -> token ids."""

    batch: Positive = 16
    actors: Positive = 1
    cpus_per_actor: float = Field(default=1, gt=0)
    gpus_per_actor: float = Field(default=0, ge=0)
    cpus_per_decoder: float = Field(default=0.5, ge=0)
    """What each task that decodes pictures reserves; nothing where the actors take every CPU that there is."""
    caption: Literal["short", "long", "fused"] = "short"
    """Which text of a work is trained on; `long` wants caption.long_model."""
    resolution_px: Positive = 512
    """Square pictures of this size: the short side is scaled to it and the centre kept."""
    max_bad_fraction: Fraction = 0.05

    @model_validator(mode="after")
    def _eight(self) -> Encode:
        if self.resolution_px % 8:
            raise ValueError(f"resolution_px={self.resolution_px} is not a multiple of 8; try {-(-self.resolution_px // 8) * 8}")
        return self


class Diffusion(Section):
    """The base model that is fine-tuned and served."""

    model: str = "CompVis/stable-diffusion-v1-4"
    revision: str | None = None
    variant: str | None = None
    """A weight variant on the hub, such as fp16."""


class Wandb(Section):
    project: str = "momalisa"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when WANDB_API_KEY is set, else offline."""


class Train(Section):
    """train: cached latents -> checkpoints."""

    seed: int = 0
    images: Positive = 20_000
    """The length of the run, in images seen."""
    batch: Positive = 32
    """The global batch: whole cells, dealt to the workers as evenly as can be."""
    cell: Positive | None = None
    """Works of one shape that stay together, whatever the number of workers (default: 1 to 4, by the batch)."""
    micro_batch: Positive | None = None
    """Most works in one pass through the UNet; a worker with more takes several passes to a step (default: one pass)."""
    workers: Positive = 2
    min_workers: Positive | None = None
    """Go on with as few as this when nodes are lost, and grow back to `workers` (default: wait for all of them)."""
    resize_check_s: float = Field(default=60, gt=0)
    """How often an elastic run looks whether it may grow."""
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    threads: Positive | None = None
    """Threads of each worker on a CPU (default: cpus_per_worker)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = False
    """Compile the UNet, once for each shape of a batch: minutes at first, then faster steps."""
    learning_rate: float = Field(default=1e-5, gt=0)
    warmup_images: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(default=1e-2, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    caption_dropout: Fraction = 0.1
    min_snr_gamma: float | None = Field(default=5.0, gt=0)
    lora_rank: Positive | None = None
    """Train low-rank adapters of this rank on the attention layers instead of all weights."""
    gradient_checkpointing: bool = False
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Works kept out of training, chosen by the hash of their id: promote measures on them."""
    checkpoint_every_images: Positive = 5_000
    keep_states: Positive = 2
    """How many of the newest checkpoints keep what training resumes from (10 GB each for a full fine-tune)."""
    evaluate_every_steps: Positive = 250
    """Pictures of the evaluation prompts, at fixed seeds."""
    evaluation_prompts: tuple[str, ...] = EVALUATION_PROMPTS
    evaluation_steps: Positive = 20
    evaluation_guidance: float = Field(default=7.5, ge=1)
    max_failures: Annotated[int, Field(ge=0)] = 2

    @property
    def cell_size(self) -> int:
        """`cell`, or by default up to 4 that divide the batch into at least 4 cells."""
        return self.cell or next((size for size in (4, 3, 2) if self.batch % size == 0 and self.batch >= 4 * size), 1)

    @model_validator(mode="after")
    def _divides(self) -> Train:
        size = self.cell_size
        if self.batch % size:
            near = sorted({max(self.batch // size, 1) * size, -(-self.batch // size) * size})
            raise ValueError(f"batch={self.batch} is not a multiple of cell={size}; try {' or '.join(map(str, near))}")
        if self.batch // size < self.workers:
            raise ValueError(
                f"batch={self.batch} makes {self.batch // size} cells of {size}, fewer than workers={self.workers}; "
                f"try batch={self.workers * size}" + (f" or cell={max(self.batch // self.workers, 1)}" if size > 1 else "")
            )
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}; try {self.workers}")
        return self


class Promote(Section):
    """promote: measure every checkpoint, choose, and move `refs/best`."""

    timesteps: Positive = 10
    """Timesteps of the held-out grid, evenly spread."""
    max_pictures: Positive = 64
    """Held-out pictures at most."""
    distance_pictures: Annotated[int, Field(ge=0)] = 0
    """Pictures generated for the distance to the collection (MMD); 0: leave it out."""
    distance_steps: Positive = 12
    guidance_scale: float = Field(default=7.5, ge=1)
    """Of the pictures that promote generates."""
    clip_model: str | None = None
    clip_revision: str | None = None
    reference: Literal["collection", "wing"] = "collection"
    """What generated pictures are compared with: held-out works, or further works of the miniature museum."""
    batch: Positive = 32
    cpus_per_task: float = Field(default=1, gt=0)
    gpus_per_task: float = Field(default=0, ge=0)
    tasks: Positive = 2
    """Pieces that the pictures of one model are generated in, side by side."""
    contact_prompts: tuple[str, ...] = EVALUATION_PROMPTS
    """Drawn by the base and by the best checkpoint at equal seeds, side by side."""
    allow_worse: bool = False
    """Promote the best checkpoint even where its held-out loss is not below the base's."""


class Serve(Section):
    """serve: refs/best behind HTTP."""

    steps: Positive = 20
    guidance_scale: float = Field(default=7.5, ge=1)
    size_px: Positive = 512
    max_pictures_per_request: Positive = 8
    max_prompt_chars: Positive = 2_000
    prompt_prefix: str = "A MOMA artwork of: "
    """Put before what a visitor types, unless it is there already."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_batch: Positive = 8
    """Pictures generated together by one replica."""
    max_waiting: Positive = 64
    """Requests that may wait in line; the next gets a 429."""


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
