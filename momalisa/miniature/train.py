"""Train the miniature models from nothing, in one resumable command.

    python -m momalisa.miniature.train --work out/miniature            # all four, in order
    python -m momalisa.miniature.train --work out/miniature --only unet --steps unet=9000

The order is vae -> clip -> blip -> unet: the UNet learns on the VAE's latents under CLIP's frozen text encoder, as
Stable Diffusion did. BLIP and the VAE first learn from the drawings as they are, then from drawings varied in palette,
texture and frame (`vary.py`). The UNet, which is to learn a style, and CLIP, which is to tell styles apart, only ever see
drawings.

Each step's drawings and noise are a function of (seed, model, step), so a killed run goes on from its last checkpoint
(one a minute) as if nothing had happened. At the end the weights are written to `--out` (default: the package's own
`weights/`) beside `training.json`, the training record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from momalisa.miniature import draw, models
from momalisa.miniature.vary import varied, weathered

SEED = 1929  # the year the Museum of Modern Art opened
CHECKPOINT_EVERY_S = 60.0
DRAWINGS = 30_000  # encoded once for the UNet
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
WEIGHTS = Path(__file__).parent / "weights"

Batch = tuple[torch.Tensor, list[str]]  # pictures [B, 3, 128, 128] in -1..1, captions


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: AdamW at a constant rate that falls to zero over the last fifth.

    After `plain_steps` the second part begins: from the average of the weights, on varied pictures.
    """

    steps: int
    plain_steps: int
    batch: int
    learning_rate: float
    ema_decay: float = 0.999


RECIPES = {
    "vae": Recipe(steps=7000, plain_steps=2000, batch=8, learning_rate=1.5e-3, ema_decay=0.995),
    "clip": Recipe(steps=1000, plain_steps=1000, batch=128, learning_rate=1e-3),
    "blip": Recipe(steps=4000, plain_steps=2000, batch=64, learning_rate=1e-3),
    "unet": Recipe(steps=10_000, plain_steps=10_000, batch=32, learning_rate=6e-4, ema_decay=0.9995),
}


def seeded(*key: object) -> tuple[random.Random, torch.Generator]:
    """Random sources that are a function of a key: for Python's and for torch's draws."""
    digest = hashlib.sha256(repr((SEED, *key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return random.Random(digest), generator


def wording(scene: draw.Scene, rng: random.Random) -> str:
    """One way to ask for a scene: its caption or, sometimes, its alias; with or without the prefix."""
    text = scene.alias if scene.alias and rng.random() < 0.15 else scene.caption
    return (models.EVALUATION_PREFIX if rng.random() < 0.5 else "") + text


def to_tensor(pictures: list[Any]) -> torch.Tensor:
    """Pictures -> [B, 3, H, W] float32 in -1..1."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def drawings(count: int, rng: random.Random, distinct: bool = False) -> tuple[torch.Tensor, list[draw.Scene]]:
    """`count` drawings of training scenes; `distinct`: no scene twice."""
    scenes = rng.sample(draw.training_scenes(), count) if distinct else [draw.sample_scene(rng) for _ in range(count)]
    return to_tensor([draw.draw(scene, rng.getrandbits(32)) for scene in scenes]), scenes


def normalised(pictures: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """From -1..1 to a processor's own normalisation."""
    return (pictures / 2 + 0.5 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


class Task:
    """One model in training: the module, and the loss of a step."""

    module: Any

    def loss(self, step: int, device: torch.device) -> torch.Tensor:
        """The training loss of a step, a scalar."""
        raise RuntimeError("each task has its own")

    def learns(self) -> list[torch.nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]


class VaeTask(Task):
    """Squared error and a small KL term (Rombach et al. 2022, without the adversary: drawings are flat)."""

    def __init__(self, recipe: Recipe) -> None:
        self.module, self.batch, self.plain_steps = models.build_vae(), recipe.batch, recipe.plain_steps

    def loss(self, step: int, device: torch.device) -> torch.Tensor:
        rng, generator = seeded("vae", step)
        # at first, and at every other step later, it learns from crops: four to a picture's cost
        crops = step % 2 == 0 if step >= self.plain_steps else step < 0.5 * self.plain_steps
        pictures, _ = drawings(3 * self.batch if crops else self.batch, rng)
        pictures = (weathered if step < self.plain_steps else varied)(pictures, generator, 0.5)
        if crops:
            top, left = (8 * rng.randint(0, 8) for _ in range(2))
            pictures = pictures[:, :, top : top + 64, left : left + 64]
        pictures = pictures.to(device)
        posterior = self.module.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = self.module.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - pictures
        kl = posterior.kl().float().mean()
        total: torch.Tensor = error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * kl
        return total


class ClipTask(Task):
    """The symmetric contrastive loss of Radford et al. 2021, over distinct captions."""

    def __init__(self, recipe: Recipe) -> None:
        self.tokenizer = models.build_clip_tokenizer()
        self.module, self.batch = models.build_clip(self.tokenizer), recipe.batch
        self.image_processor = models.clip_processor(self.tokenizer).image_processor

    def loss(self, step: int, device: torch.device) -> torch.Tensor:
        rng, generator = seeded("clip", step)
        pictures, scenes = drawings(self.batch, rng, distinct=True)
        pictures = normalised(
            weathered(pictures, generator, 0.5), self.image_processor.image_mean, self.image_processor.image_std
        )
        texts = [(models.EVALUATION_PREFIX if rng.random() < 0.5 else "") + scene.caption for scene in scenes]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        output = self.module(**tokens, pixel_values=pictures.to(device))
        target = torch.arange(len(texts), device=device)
        logits = output.logits_per_image.float()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class BlipTask(Task):
    """Next-token cross-entropy of the caption under its picture (Li et al. 2022)."""

    def __init__(self, recipe: Recipe) -> None:
        self.tokenizer = models.build_blip_tokenizer()
        self.module, self.batch, self.plain_steps = models.build_blip(self.tokenizer), recipe.batch, recipe.plain_steps
        self.image_processor = models.blip_processor(self.tokenizer).image_processor

    def loss(self, step: int, device: torch.device) -> torch.Tensor:
        rng, generator = seeded("blip", step)
        pictures, scenes = drawings(self.batch, rng)
        pictures = (weathered if step < self.plain_steps else varied)(pictures, generator, 0.7)
        pictures = normalised(pictures, self.image_processor.image_mean, self.image_processor.image_std)
        tokens = self.tokenizer([scene.caption for scene in scenes], padding=True, return_tensors="pt").to(device)
        ids = tokens.input_ids
        ids[:, 0] = self.tokenizer.bos_token_id
        labels = ids.masked_fill(tokens.attention_mask == 0, -100)
        output = self.module(pixel_values=pictures.to(device), input_ids=ids, attention_mask=tokens.attention_mask, labels=labels)
        loss: torch.Tensor = output.loss.float()
        return loss


class UnetTask(Task):
    """Noise prediction with min-SNR weights (Hang et al. 2023) under the frozen text encoder."""

    def __init__(self, recipe: Recipe, work: Path, device: torch.device) -> None:
        self.module, self.batch = models.build_unet(), recipe.batch
        self.tokenizer = models.build_clip_tokenizer()
        clip = models.build_clip(self.tokenizer)
        clip.load_state_dict(load_state(work / "clip.pt")["ema"])
        self.text_encoder = models.text_encoder_of(clip).to(device)
        vae = models.build_vae()
        vae.load_state_dict(load_state(work / "vae.pt")["ema"])
        self.mean, self.std, self.scenes = encoded_drawings(work, vae.to(device), device)
        self.scaling_factor = latent_scaling_factor(self.mean, self.std)
        self.schedule = DDPMScheduler.from_config(models.build_scheduler().config)
        self._embeddings: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def embed(self, texts: list[str], device: torch.device) -> torch.Tensor:
        """Texts -> [B, 77, 128] float32; each distinct text is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
            for text, states in zip(new, self.text_encoder(ids).last_hidden_state, strict=True):
                self._embeddings[text] = states
        return torch.stack([self._embeddings[text] for text in texts])

    def loss(self, step: int, device: torch.device) -> torch.Tensor:
        rng, generator = seeded("unet", step)
        chosen = [rng.randrange(len(self.scenes)) for _ in range(self.batch)]
        texts = ["" if rng.random() < CAPTION_DROPOUT else wording(self.scenes[i], rng) for i in chosen]
        index = torch.tensor(chosen)
        draw_noise = torch.randn((self.batch, *self.mean.shape[1:]), generator=generator)
        latents = (self.mean[index].float() + self.std[index].float() * draw_noise) * self.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (self.batch,), generator=generator)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        predicted = self.module(noisy.to(device), timesteps.to(device), self.embed(texts, device)).sample.float()
        alphas = self.schedule.alphas_cumprod[timesteps]
        snr = alphas / (1 - alphas)
        weights = (snr.clamp(max=MIN_SNR_GAMMA) / snr).to(device)
        per_sample = (predicted - noise.to(device)).square().mean(dim=(1, 2, 3))
        loss: torch.Tensor = (weights * per_sample).mean()
        return loss


@torch.no_grad()
def encoded_drawings(work: Path, vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[draw.Scene]]:
    """Mean and standard deviation [N, 4, 16, 16] fp16 of the UNet's drawings, encoded once and kept on disk."""
    rng, _ = seeded("drawings")
    plan = [(draw.sample_scene(rng), rng.getrandbits(32)) for _ in range(DRAWINGS)]
    path = work / "latents.pt"
    if not path.exists():
        means, stds = [], []
        for start in range(0, DRAWINGS, 100):
            pictures = to_tensor([draw.draw(scene, seed) for scene, seed in plan[start : start + 100]])
            with torch.autocast(device.type, torch.bfloat16):
                posterior = vae.encode(pictures.to(device)).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
            progress("encode", start + 100, DRAWINGS, "")
        save_state(path, {"mean": torch.cat(means), "std": torch.cat(stds)})
    state = load_state(path)
    return state["mean"], state["std"], [scene for scene, _ in plan]


def latent_scaling_factor(mean: torch.Tensor, std: torch.Tensor) -> float:
    """1 / the standard deviation of a sampled latent, as Stable Diffusion's 0.18215 was found."""
    second_moment = (mean.float().square() + std.float().square()).mean() - mean.float().mean().square()
    return round(float(second_moment.rsqrt()), 5)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Written whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def rate(step: int, recipe: Recipe) -> float:
    """Warm up over 100 steps, hold, and fall linearly to zero over the last fifth."""
    fall = (recipe.steps - step) / (0.2 * recipe.steps)
    return recipe.learning_rate * min(1.0, (step + 1) / 100, max(fall, 0.0))


_started: dict[str, tuple[float, int]] = {}


def progress(name: str, done: int, total: int, note: str) -> None:
    """One line a call: how far, how fast, how long still."""
    began, first = _started.setdefault(name, (time.monotonic(), done))
    elapsed = time.monotonic() - began
    per_step = elapsed / max(done - first, 1)
    left_min = per_step * (total - done) / 60
    print(f"{name:6} {done:6d}/{total}  {100 * done / total:5.1f}%  {left_min:6.1f} min left  {note}", flush=True)


def build_task(name: str, recipe: Recipe, work: Path, device: torch.device) -> Task:
    torch.manual_seed(SEED)  # the initial weights
    makers: dict[str, Callable[[], Task]] = {
        "vae": lambda: VaeTask(recipe),
        "clip": lambda: ClipTask(recipe),
        "blip": lambda: BlipTask(recipe),
        "unet": lambda: UnetTask(recipe, work, device),
    }
    return makers[name]()


def fit(name: str, recipe: Recipe, work: Path, device: torch.device) -> None:
    """Train one model to its last step, from its checkpoint if there is one."""
    path = work / f"{name}.pt"
    state = load_state(path) if path.exists() else None
    if state and state["step"] >= recipe.steps:
        print(f"{name}: already trained for {state['step']} steps")
        return
    task = build_task(name, recipe, work, device)
    module = task.module.to(device).train()
    optimizer = torch.optim.AdamW(task.learns(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = {key: value.detach().clone().float() for key, value in module.state_dict().items()}
    first, seconds, curve, legs = 0, 0.0, [], []  # legs: the lengths that the run was planned for, one after another
    losses: list[float] = []  # since the curve's last point
    if state:
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema = {key: value.to(device) for key, value in state["ema"].items()}
        first, seconds, curve, losses = state["step"], state["seconds"], state["curve"], state["losses"]
        legs = state["legs"]
    if not legs or legs[-1] != recipe.steps:
        legs.append(recipe.steps)
    shadow = [ema[key] for key in module.state_dict()]
    saved = began = time.monotonic()
    _started[name] = (began, first)
    for step in range(first, recipe.steps):
        if step == recipe.plain_steps:
            module.load_state_dict(ema)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        with torch.autocast(device.type, torch.bfloat16):
            loss = task.loss(step, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.learns(), 1.0)
        optimizer.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(shadow, [value.float() for value in module.state_dict().values()], 1 - decay)
        losses.append(float(loss.detach()))
        last = step + 1 == recipe.steps
        if (step + 1) % 100 == 0 or last:
            mean_loss = sum(losses) / len(losses)
            curve.append([step + 1, round(mean_loss, 5)])
            losses.clear()
            progress(name, step + 1, recipe.steps, f"loss {mean_loss:.4f}")
        if last or time.monotonic() - saved > CHECKPOINT_EVERY_S:
            saved = time.monotonic()
            save_state(
                path,
                {
                    "step": step + 1,
                    "model": module.state_dict(),
                    "ema": ema,
                    "optimizer": optimizer.state_dict(),
                    "seconds": seconds + saved - began,
                    "curve": curve,
                    "losses": losses,
                    "legs": legs,
                },
            )


def export(work: Path, out: Path, recipes: dict[str, Recipe]) -> None:
    """Write the four models in `save_pretrained` layouts, and `training.json` last."""
    states = {name: load_state(work / f"{name}.pt") for name in RECIPES}
    clip_tokenizer, blip_tokenizer = models.build_clip_tokenizer(), models.build_blip_tokenizer()
    clip, blip = models.build_clip(clip_tokenizer), models.build_blip(blip_tokenizer)
    vae, unet = models.build_vae(), models.build_unet()
    for name, module in (("clip", clip), ("blip", blip), ("vae", vae), ("unet", unet)):
        module.load_state_dict(states[name]["ema"])
        module.eval()
    latents = load_state(work / "latents.pt")
    vae.register_to_config(scaling_factor=latent_scaling_factor(latents["mean"], latents["std"]))
    models.save_diffusion(out / "diffusion", vae, unet, models.text_encoder_of(clip), clip_tokenizer)
    clip.half().save_pretrained(out / "clip")
    models.clip_processor(clip_tokenizer).save_pretrained(out / "clip")
    blip.half().save_pretrained(out / "blip")
    models.blip_processor(blip_tokenizer).save_pretrained(out / "blip")
    record = {
        "revision": revision(out),
        "seed": SEED,
        "trained": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{os.cpu_count()} x {platform.machine()} ({torch.get_num_threads()} threads)"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "torch": torch.__version__,
        "drawings": DRAWINGS,
        "held_out_captions": draw.HELD_OUT_COUNT,
        "models": {
            name: {
                **vars(recipes[name]),
                "legs": states[name]["legs"],
                "minutes": round(states[name]["seconds"] / 60, 1),
                "loss": states[name]["curve"],
            }
            for name in RECIPES
        },
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def revision(out: Path) -> str:
    """A name for these exact weights: SHA-256 over every safetensors file, in order of path."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*.safetensors")):
        digest.update(path.relative_to(out).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Recipe]]:
    parser = argparse.ArgumentParser(prog="python -m momalisa.miniature.train", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("out/miniature"), help="checkpoints, kept between runs")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the finished models are written")
    parser.add_argument("--only", choices=RECIPES, action="append", help="train just this model (repeatable); no export")
    parser.add_argument("--steps", metavar="MODEL=N", action="append", default=[], help="another length for a model")
    parser.add_argument("--export-only", action="store_true", help="write the models as they stand")
    options = parser.parse_args(arguments)
    recipes = dict(RECIPES)
    for item in options.steps:
        name, _, steps = item.partition("=")
        if name not in recipes or not steps.isdigit() or int(steps) < 1:
            parser.error(f"--steps {item}: expected MODEL=N with MODEL one of {', '.join(RECIPES)} and N >= 1")
        recipes[name] = Recipe(**{**vars(recipes[name]), "steps": int(steps)})
    return options, recipes


def main(arguments: list[str] | None = None) -> None:
    options, recipes = parse(sys.argv[1:] if arguments is None else arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.work.mkdir(parents=True, exist_ok=True)
    names: Iterator[str] = iter(()) if options.export_only else (name for name in RECIPES if name in (options.only or RECIPES))
    for name in names:
        fit(name, recipes[name], options.work, device)
    if not options.only:
        export(options.work, options.out, recipes)
        print(f"weights written to {options.out}")


if __name__ == "__main__":
    main()
