"""Settings of train and promote, and of the base model."""

from __future__ import annotations

from itertools import count
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from momalisa.config.section import EVALUATION_PROMPTS, Fraction, Positive, Section

LONGEST_EMA = 0.28  # of power-function averages: just below the flattest one's 1 / sqrt(12)


class Diffusion(Section):
    """The base model that is fine-tuned and served."""

    model: str = "CompVis/stable-diffusion-v1-4"
    revision: str | None = None
    variant: str | None = None
    """A weight variant on the hub, such as fp16."""


class Wandb(Section):
    """W&B, and TensorBoard as an alternative or beside it."""

    project: str = "momalisa"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when WANDB_API_KEY is set, else offline."""
    connect_timeout_s: float = Field(default=20, gt=0)
    """How long to wait for the server before going on offline."""
    tensorboard: bool = False
    """Write TensorBoard's files to <root>/tensorboard/<run> (needs `pip install momalisa[tensorboard]`)."""


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
    deterministic: bool = False
    """Only algorithms that give the same bits each time, for bit-identical resumes on CUDA; slower there."""
    compile: bool = False
    """Compile the UNet, once for each shape of a batch: minutes at first, then faster steps."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: Adam's moments in 8 bits (Dettmers et al. 2022), a quarter of their memory; needs bitsandbytes."""
    learning_rate: float = Field(default=1e-5, gt=0)
    warmup_images: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(default=1e-2, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    ema_offload: bool = False
    """Keep the average in the machine's memory, not the accelerator's: 3.2 GiB less for Stable Diffusion 1.x, slower steps."""
    power_ema: bool = False
    """Keep two power-function averages too, and a copy of them with every checkpoint, from which promote makes averages of
    other lengths after training (Karras et al. 2024). Each is as large as the trained weights in fp32."""
    keep_averages: Annotated[int, Field(ge=2)] = 16
    """How many of these copies stay, evenly spread over the run: what is made of 16 is 2% off or less (docs/training.md)."""
    caption_dropout: Fraction = 0.1
    flip: bool = False
    """Mirror each work in half of the epochs, by chance; wants encode.mirrored. Signatures and letters are mirrored too."""
    min_snr_gamma: float | None = Field(default=5.0, gt=0)
    """Weigh timesteps by min(SNR, gamma) / SNR (Hang et al. 2023); null: all alike."""
    offset_noise: float = Field(default=0.0, ge=0)
    """This much noise that is constant over a channel: darker darks and brighter brights; 0.05 to 0.1 is usual."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step is noise alone (Lin et al. 2024); for v-prediction models only. Pictures
    are then drawn on that schedule, beginning with its last timestep."""
    prior_weight: float = Field(default=0.0, ge=0)
    """Prior preservation: weight of staying near the frozen base's own predictions for general prompts. No pictures needed;
    a step costs a pass of the base and twice the samples."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank on the attention layers instead of all weights."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """Adapters are scaled by lora_alpha / lora_rank (default: 1)."""
    dora: bool = False
    """Adapters with a magnitude of their own (Liu et al. 2024): nearer to a full fine-tune, slower."""
    lora_text_encoder: bool = False
    """Adapters on the text encoder's attention too; texts are then embedded at every step. They are loaded wherever the
    checkpoint is."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third more time, a fraction of the memory."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """What workers exchange: gradients in full, or in 16 bits, for half the traffic and a little less precision."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """The accelerator's dense peak in `precision`, for the MFU (default: known for common NVIDIA GPUs, else no MFU)."""
    cache_dir: str | None = None
    """A folder on each node's own disk, not on one that nodes share (locks on NFS are not reliable), for the latents: 6.4 GB for
    100,000 works at 512x512, twice that with encode.mirrored (default: below the system's folder for temporary files)."""
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Works kept out of training, chosen by hash: promote measures on them."""
    split_by: Literal["work", "artist"] = "work"
    """What is either trained on or held out: each work by itself, or all works of an artist (those of nobody by themselves)."""
    checkpoint_every_images: Positive = 5_000
    keep_states: Positive = 2
    """How many of the newest checkpoints keep what training resumes from (10 GB each for a full fine-tune)."""
    keep_weights: Positive | None = None
    """How many of the newest checkpoints stay at all (default: every one). What refs/ or one of the last promotions names, and
    the one with the lowest held-out loss so far, always stay."""
    early_stop_patience: Positive | None = None
    """End the run when the held-out loss has not improved for so many checkpoints (default: never)."""
    evaluate_every_steps: Positive = 250
    """Pictures of the evaluation prompts, at fixed seeds."""
    evaluation_prompts: tuple[str, ...] = EVALUATION_PROMPTS
    more_prompts: tuple[str, ...] = ()
    """Your own, after the evaluation prompts."""
    evaluation_steps: Positive = 20
    evaluation_guidance: float = Field(default=7.5, ge=1)
    max_failures: Annotated[int, Field(ge=0)] = 2

    @property
    def cell_size(self) -> int:
        """`cell`, or by default up to 4 that divide the batch into at least 4 cells."""
        return self._cell_of(self.batch)

    @property
    def share(self) -> int:
        """The most works of a batch that fall to one worker: whole cells, of the fewest workers that the run goes on with."""
        return self.share_of(self.min_workers or self.workers)

    def share_of(self, workers: int) -> int:
        """The most works of a batch that fall to one of so many workers."""
        return -(-self._cells_of(self.batch) // workers) * self.cell_size

    def _cell_of(self, batch: int) -> int:
        return self.cell or next((size for size in (4, 3, 2) if batch % size == 0 and batch >= 4 * size), 1)

    def _cells_of(self, batch: int) -> int:
        """How many whole cells a batch is; 0 where it is none."""
        size = self._cell_of(batch)
        return 0 if batch % size else batch // size

    @field_validator("lora_rank")
    @classmethod
    def _a_rank(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("adapters have a rank of at least 1; try 16, or leave lora_rank out to train all weights")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Train:
        for name in ("lora_alpha", "dora", "lora_text_encoder"):
            if getattr(self, name) and self.lora_rank is None:
                raise ValueError(f"{name} says how adapters are, but lora_rank is not set; try lora_rank=16")
        if self.zero_terminal_snr and self.min_snr_gamma is not None:
            raise ValueError(
                f"min_snr_gamma={self.min_snr_gamma:g} gives the last timestep of zero_terminal_snr no weight at all; "
                "set min_snr_gamma to null"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> Train:
        size = self.cell_size
        if self.batch % size:
            near = {self.batch // size * size, -(-max(self.batch, self.workers * size) // size) * size}
            valid = sorted(batch for batch in near if self._cells_of(batch) >= self.workers)
            raise ValueError(f"batch={self.batch} is not a multiple of cell={size}; try {' or '.join(map(str, valid))}")
        if self.batch // size < self.workers:
            shares = count(self.batch // self.workers + 1)
            larger = next(batch for share in shares if self._cells_of(batch := share * self.workers) >= self.workers)
            smaller = [cell for cell in range(1, size) if self.batch % cell == 0 and self.batch // cell >= self.workers]
            raise ValueError(
                f"batch={self.batch} makes {self.batch // size} cells of {size}, fewer than workers={self.workers}; "
                f"try batch={larger}" + (f" or cell={smaller[-1]}" if smaller else "")
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
    """Pictures generated for the distance to the collection (MMD), at most one for each held-out work; 0: leave it out. Fewer
    than `tie_pictures` are a figure in the report that decides nothing."""
    distance_steps: Positive = 12
    guidance_scale: float = Field(default=7.5, ge=1)
    """Of the pictures that promote generates."""
    clip_model: str | None = None
    clip_revision: str | None = None
    reference: Literal["collection", "wing"] = "collection"
    """What generated pictures are compared with: held-out works, or further works of the miniature museum."""
    ema_lengths: tuple[Annotated[float, Field(gt=0, le=LONGEST_EMA)], ...] = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20)
    """With `train.power_ema`: lengths of averages, as shares of the run, that are candidates beside the newest checkpoint."""
    batch: Positive = 32
    cpus_per_task: float = Field(default=1, gt=0)
    gpus_per_task: float = Field(default=0, ge=0)
    tasks: Positive = 2
    """Most measurements side by side."""
    contact_prompts: tuple[str, ...] = EVALUATION_PROMPTS
    """Drawn by the base and by the best checkpoint at equal seeds, side by side."""
    general_pictures: Annotated[int, Field(ge=0, le=200)] = 200
    """General captions, drawn once by the base, whose loss shows what a fine-tune forgets; 0: leave that gate out."""
    general_tolerance: float = Field(default=0.02, ge=0)
    """How much worse than the base's that loss may be, as a share of it."""
    gate_pictures: Annotated[int, Field(ge=0)] = 64
    """Pictures of training captions that the gates on alignment and copies look at; 0: leave both out."""
    alignment_model: str | None = None
    """A CLIP, SigLIP or BLIP that says how well pictures show their captions, not the text encoder of `diffusion.model`
    (None: leave that gate out)."""
    alignment_revision: str | None = None
    alignment_slack: float = Field(default=0.0, ge=0)
    """How far below the base's 95% interval the mean alignment may be, in the judge's units."""
    copy_rate: Fraction = 0.05
    """Share of pictures that may be copies of a training picture (see momalisa/copies.py)."""
    tie_pictures: Positive = 500
    """Checkpoints whose held-out losses are tied are told apart by their distance to the collection, if that is measured on
    so many pictures; else the lowest loss is chosen."""
    votes_needed: Positive = 200
    """Pairwise votes that are enough to overrule the scores."""
    watch_patience_s: float = Field(default=3600, gt=0)
    """How long `promote --watch` waits for a checkpoint, before it says that training seems to be over and ends."""
    measure_all: bool = False
    """Measure the gates of every checkpoint, not only of those that could be chosen."""
    allow_worse: bool = False
    """Promote the lowest held-out loss even where no checkpoint is better than the base and passes the gates."""
