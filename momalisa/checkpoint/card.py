"""The model card: what a checkpoint is, where it comes from, and on which terms it may be passed on.

Written beside the weights as README.md, with the front matter that model hubs read. The same manifest gives the same card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

OPENRAIL = "creativeml-openrail-m"
APACHE = "apache-2.0"
OTHER = "other"
LICENCES = {  # by the beginning of the base's name
    "CompVis/stable-diffusion-v1": OPENRAIL,
    "runwayml/stable-diffusion-v1": OPENRAIL,
    "stable-diffusion-v1-5/": OPENRAIL,
    "stabilityai/stable-diffusion-2": "openrail++",
    "miniature://": APACHE,
}
TERMS = {
    OPENRAIL: """The base is published under the CreativeML OpenRAIL-M licence, and so is this fine-tune of it. Whoever
distributes it, or offers it as a service, must pass on the licence's use restrictions (its Attachment A) in an enforceable
way, give recipients a copy of the licence, and state that the files were changed. The licence claims no rights in the
pictures; those who generate them answer for their use. <https://huggingface.co/spaces/CompVis/stable-diffusion-license>""",
    APACHE: "The base is one of MOMA Lisa's own miniature models, under the Apache License 2.0.",
    OTHER: "The base's own licence holds for this fine-tune: read it before you pass the weights on.",
}


def licence(model: str) -> str:
    """A base model's licence, as hubs spell it; `other` where nobody told us."""
    return next((name for beginning, name in LICENCES.items() if model.startswith(beginning)), OTHER)


def card(manifest: Mapping[str, Any], scores: Mapping[str, Any] | None = None) -> str:
    """Markdown for a checkpoint's manifest (`asdict` of it), with the scores that promotion measured, if it did."""
    base, training = manifest["base"], manifest["training"]
    terms = manifest["licence"] or OTHER
    front = {
        "license": terms,
        "base_model": base["model"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "lora" if manifest["lora"] else "full-fine-tune", "momalisa"],
    }
    chosen = training.get("settings") or {}
    adapted = "the UNet and the text encoder" if chosen.get("lora_text_encoder") else "the UNet"
    kind = f"LoRA adapters for {adapted}" if manifest["lora"] else "a UNet, fine-tuned whole"
    schedule = {"noise schedule": "with zero terminal SNR"} if chosen.get("zero_terminal_snr") else {}
    made = training.get("average")
    average = {"average of the weights": f"a power function, sigma_rel {made['sigma_rel']:g}"} if made else {}
    by_artist = {"held-out works": "chosen by the artist named first: works that name them second may have been trained on"}
    facts = {
        "what": kind,
        "base model": f"{base['model']} at revision {base.get('revision') or '(as it is)'}",
        **schedule,
        **average,
        "images seen": f"{manifest['images_seen']:,}",
        "dataset version": training.get("dataset", "not recorded"),
        **(by_artist if chosen.get("split_by") == "artist" else {}),
        "encoder": training.get("encoder_id", "not recorded"),
        **{name.replace("_", " "): f"{value:.5g}" for name, value in sorted(manifest["metrics"].items())},
    }
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            f"# {manifest['run']} at {manifest['images_seen']:,} images",
            "",
            *_table(facts),
            "",
            "## Scores",
            "",
            *(_table(_scores(scores)) if scores else ["Not measured yet: the promote job does."]),
            "",
            "## Use",
            "",
            *_use(manifest),
            "",
            "## Licence and rights",
            "",
            TERMS.get(terms, TERMS[OTHER]),
            "",
            "The pictures it was trained on have rights of their own, which travel with the dataset's records: whoever shows or",
            "sells what it makes needs the permissions that those works ask for.",
            "",
        ]
    )


def _table(facts: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def _scores(scores: Mapping[str, Any]) -> dict[str, str]:
    numbers = {name: value for name, value in scores.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {name.replace("_", " "): f"{value:.5g}" for name, value in numbers.items()}


def _use(manifest: Mapping[str, Any]) -> list[str]:
    name = f"{manifest['run']}@{manifest['images_seen']}"
    loaded = (
        f'pipeline = StableDiffusionPipeline.from_pretrained("{manifest["base"]["model"]}"); pipeline.load_lora_weights("FOLDER")'
        if manifest["lora"]
        else 'pipeline = StableDiffusionPipeline.from_pretrained("FOLDER")'
    )
    lines = [f"python -m momalisa.checkpoint export {name} FOLDER --root ROOT", loaded]
    if manifest["lora"] and (manifest["training"].get("settings") or {}).get("zero_terminal_snr"):
        lines.append(
            "pipeline.scheduler = DDIMScheduler.from_config("
            'pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)'
        )
    return ["```", *lines, "```"]
