"""What may not be asked for and what may not be shown: checks that answer with a reason, or None where all is well.

prompt check    (str) -> str | None        a word list (`serve.forbidden_words`), or `serve.prompt_check: module:function`
picture check   (Image) -> str | None      the base's safety checker, or `serve.picture_check: module:function`
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from momalisa.config import Diffusion, Serve

PromptCheck = Callable[[str], str | None]
PictureCheck = Callable[[Image.Image], str | None]


def prompt_check(limits: Serve) -> PromptCheck:
    """All that the settings ask for, one after the other. Raises ValueError for a file or function that is not there."""
    checks: list[PromptCheck] = []
    if limits.forbidden_words:
        checks.append(forbidden(words_of(Path(limits.forbidden_words))))
    if limits.prompt_check:
        checks.append(imported(limits.prompt_check))
    return lambda prompt: next((reason for check in checks if (reason := check(prompt))), None)


def words_of(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"serve.forbidden_words={path}: {error.strerror or error}") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def forbidden(words: list[str]) -> PromptCheck:
    """Refuses prompts that hold one of the words or phrases, whole, whatever the case, the accents and the spaces."""
    phrases = [r"\W+".join(map(re.escape, plain(word).split())) for word in words]
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(phrases) + r")(?!\w)")

    def check(prompt: str) -> str | None:
        return "the prompt holds a word that this museum does not paint" if words and pattern.search(plain(prompt)) else None

    return check


def plain(text: str) -> str:
    """Compatibility forms, accents, case and what nobody sees (zero width: category Cf) folded away."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(one for one in letters if not (unicodedata.combining(one) or unicodedata.category(one) == "Cf")).casefold()


def imported(name: str) -> Callable[[Any], str | None]:
    """The function that `module:function` names. Raises ValueError."""
    module, _, function = name.partition(":")
    try:
        found: Callable[[Any], str | None] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} is no check: expected module:function; {error}") from error
    return found


def picture_check(limits: Serve, diffusion: Diffusion, device: Any) -> PictureCheck | None:
    """None where nothing is checked. Raises ValueError for a function that is not there."""
    if limits.picture_check == "off":
        return None
    if limits.picture_check != "auto":
        return imported(limits.picture_check)
    return safety_checker(diffusion, device)


def said(limits: Serve, check: PictureCheck | None) -> str:
    """Which picture check is at work, for the log and for /healthz."""
    if check is None:
        return "off" if limits.picture_check == "off" else "none: the base model has no safety checker"
    return "safety_checker" if limits.picture_check == "auto" else limits.picture_check


def safety_checker(diffusion: Diffusion, device: Any) -> PictureCheck | None:
    """Stable Diffusion's own (Rombach et al. 2022, as CompVis published it); None where the base's `model_index.json` names none.

    Raises ValueError for one that is named and cannot be loaded: it is never left out in silence.
    """
    if not (_index(diffusion).get("safety_checker") or [None])[0]:
        return None
    import numpy as np
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    from momalisa.pretrained import pretrained

    names = {"revision": diffusion.revision}
    try:
        options = {**names, "variant": diffusion.variant}
        judge = pretrained(StableDiffusionSafetyChecker, diffusion.model, subfolder="safety_checker", **options).to(device).eval()
        prepare = pretrained(CLIPImageProcessor, diffusion.model, subfolder="feature_extractor", **names)
    except ValueError as error:
        raise ValueError(f"{error}. Its model_index.json names a safety checker; serve.picture_check=off does without") from error

    @torch.no_grad()
    def check(picture: Image.Image) -> str | None:
        pixels = prepare(picture, return_tensors="pt").pixel_values.to(device)
        _, found = judge(clip_input=pixels, images=[np.asarray(picture)])
        return "the safety checker withholds this picture" if found[0] else None

    return check


def _index(diffusion: Diffusion) -> dict[str, Any]:
    """What the base's pipeline consists of. Raises ValueError."""
    from diffusers import DiffusionPipeline

    from momalisa.weights import locate

    try:
        return dict(DiffusionPipeline.load_config(locate(diffusion.model), revision=diffusion.revision))
    except OSError as error:
        raise ValueError(f"cannot load {diffusion.model} (model_index.json): {' '.join(str(error).split())}") from error
