"""OpenAI's images API on the wire: what a request may say.

Beside OpenAI's own fields a request may hold `seed`, `steps`, `guidance_scale`, `sampler`, `negative_prompt`,
`strength` (edits), `reproducible`, `adapter`, `tier` and `deadline_s`. Fields that mean nothing here (`user`, `quality`,
`background`, ...) are ignored. `model` may name an adapter, as `adapter` does, and is ignored otherwise: the answer says which
checkpoint painted.
"""

from __future__ import annotations

import json
import random
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from momalisa import config
from serve.errors import ApiError
from serve.task import GenerationTask, Sampler, Tier

MAX_BODY_BYTES = 1_000_000
MAX_SEED = 2**53 - 1  # the largest whole number that JavaScript keeps exact
MAX_STEPS = 100
MAX_GUIDANCE_SCALE = 30
MAX_PARTIAL_IMAGES = 3
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
ADAPTER = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,80}/[0-9]{1,20}$"


def _encodable(text: str) -> str:
    text.encode()  # UnicodeEncodeError, a ValueError, for an unpaired surrogate: no tokenizer and no answer can hold it
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class ImagesRequest(BaseModel):
    """The fields that mean something here, with the limits that hold everywhere; null is the same as absent."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    prompt: Text
    model: Text | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Text | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, le=MAX_GUIDANCE_SCALE)] | None = None
    sampler: Sampler | None = None
    negative_prompt: Text | None = None
    reproducible: bool | None = None
    adapter: Annotated[Text, Field(pattern=ADAPTER)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    tier: Tier | None = None


class EditsRequest(ImagesRequest):
    """Of an edit: how much of the picture is given up. The picture and its mask come as files."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None


def sizes(limits: config.Serve) -> dict[str, int]:
    """The sizes a visitor may ask for: the model's own, three quarters and half of it, where these are multiples of 8."""
    sides = (side for side in (limits.size_px, limits.size_px * 3 // 4, limits.size_px // 2) if side % 8 == 0)
    return {"auto": limits.size_px} | {f"{side}x{side}": side for side in sides}


def rules(limits: config.Serve) -> dict[str, str]:
    """For every field, what it must be: the second half of an error message."""
    text = f"text (valid Unicode) of at most {limits.max_prompt_chars} characters"
    return {
        "prompt": f"{text}, and not empty",
        "model": "text (valid Unicode); run/images asks for that adapter, anything else means nothing here",
        "n": f"a whole number from 1 to {limits.max_pictures_per_request}, and 1 for a stream",
        "size": "one of " + ", ".join(sizes(limits)),
        "response_format": "b64_json or url (a data: URL)",
        "output_format": "png",
        "stream": "true or false",
        "partial_images": f"a whole number from 0 to {MAX_PARTIAL_IMAGES}",
        "seed": f"a whole number from 0 to {MAX_SEED}, the last picture's too",
        "steps": f"a whole number from 1 to {MAX_STEPS}",
        "guidance_scale": f"a number from 1 to {MAX_GUIDANCE_SCALE}",
        "sampler": "one of " + ", ".join(SAMPLERS),
        "negative_prompt": text,
        "reproducible": "true or false",
        "adapter": "a LoRA's checkpoint as run/images, such as impressionists/6400",
        "deadline_s": f"a number of seconds above 0; at most {limits.deadline_s:g} are waited",
        "tier": "one of " + ", ".join(("full", *limits.tiers)),
        "strength": "a number above 0, and at most 1, that leaves one step to do",
    }


def parse(fields: dict[str, Any], limits: config.Serve, kind: type[ImagesRequest] = ImagesRequest) -> ImagesRequest:
    """Raises ApiError (400) naming the field, the value and the rule."""
    known = {name: value for name, value in fields.items() if name in kind.model_fields}
    if "prompt" not in known:
        raise ApiError(400, f"prompt is missing: it must be {rules(limits)['prompt']}", "prompt", "missing_required_parameter")
    try:
        request = kind.model_validate(known)
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
        raise wrong(name, known[name], limits) from None
    _check(request, limits)
    return request


def _check(request: ImagesRequest, limits: config.Serve) -> None:
    """The limits of this server. Raises ApiError."""
    if not request.prompt.strip():
        raise ApiError(400, "prompt is empty: say what the artwork should show, such as 'a coffee'", "prompt", "invalid_value")
    typed = request.prompt.removeprefix(limits.prompt_prefix)  # a picture's file says the whole prompt
    for name, text in (("prompt", typed), ("negative_prompt", request.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            message = f"{name} has {len(text)} characters: at most {limits.max_prompt_chars} are allowed; shorten it"
            raise ApiError(400, message, name, "string_above_max_length")
    if request.n is not None and request.n > (1 if request.stream else limits.max_pictures_per_request):
        raise wrong("n", request.n, limits)
    if (request.seed or 0) + (request.n or 1) - 1 > MAX_SEED:
        raise wrong("seed", request.seed, limits)
    if request.size is not None and request.size not in sizes(limits):
        raise wrong("size", request.size, limits)
    if request.tier not in (None, "full", *limits.tiers):
        raise wrong("tier", request.tier, limits)
    if request.adapter and _adapter(request.model) not in (None, _adapter(request.adapter)):
        message = f"model names the adapter {request.model}, adapter names {request.adapter}: send one of them"
        raise ApiError(400, message, "adapter", "invalid_value")


def _adapter(name: str | None) -> str | None:
    """`run/images`, as /v1/models lists adapters: without leading zeros. None: it is no such name."""
    if not name or not re.fullmatch(ADAPTER, name):
        return None
    run, images = name.split("/")
    return f"{run}/{int(images)}"


def wrong(name: str, value: Any, limits: config.Serve) -> ApiError:
    shown = json.dumps(value)  # ASCII: an unpaired surrogate cannot travel in a UTF-8 answer
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return ApiError(400, f"{name} must be {rules(limits)[name]}; got {shown}", name, "invalid_value")


EXAMPLE = '{"prompt": "a coffee"}'
VOTE_EXAMPLE = '{"better": "first"}'


def from_json(body: bytes, example: str = EXAMPLE) -> dict[str, Any]:
    """Raises ApiError for what is no JSON object."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not JSON{where}; send something like {example}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object such as {example}", code="invalid_json")
    return value


WHOLE = re.compile(r"-?[0-9]{1,20}\Z")
REAL = re.compile(r"-?[0-9]{1,20}(\.[0-9]{0,20})?\Z")


def from_form(fields: dict[str, str]) -> dict[str, Any]:
    """A form's fields, all text, as JSON would have them; what reads as no number stays text and is refused by its rule."""
    values: dict[str, Any] = dict(fields)
    for name in ("n", "partial_images", "seed", "steps"):
        if WHOLE.match(fields.get(name, "")):
            values[name] = int(fields[name])
    for name in ("guidance_scale", "deadline_s", "strength"):
        if REAL.match(fields.get(name, "")):
            values[name] = float(fields[name])
    for name in ("stream", "reproducible"):
        if fields.get(name, "").lower() in ("true", "false"):
            values[name] = fields[name].lower() == "true"
    return values


class VoteRequest(BaseModel):
    """Which picture of a comparison is better."""

    model_config = ConfigDict(strict=True)

    better: Literal["first", "second"]


def better(fields: dict[str, Any]) -> Literal["first", "second"]:
    """Raises ApiError (400)."""
    try:
        return VoteRequest.model_validate(fields).better
    except ValidationError:
        raise ApiError(400, 'better must be "first" or "second"', "better", "invalid_value") from None


NOT_COMPARED = ("n", "stream", "partial_images", "response_format", "adapter", "model")  # two whole pictures, of two models


def revised(prompt: str, prefix: str) -> str:
    """The prompt as the model is asked: the prefix it was trained with, unless the visitor typed it."""
    text = prompt.strip()
    return text if text.lower().startswith(prefix.strip().lower()) else prefix + text


def generation_task(
    request: ImagesRequest, limits: config.Serve, image: bytes | None = None, mask: bytes | None = None, **more: Any
) -> GenerationTask:
    """A valid request with every default filled in; without a seed, a random one. `more`: key, kiosk, trace.

    Raises ApiError for a strength that leaves nothing to do.
    """
    first = request.seed if request.seed is not None else random.SystemRandom().randrange(2**32)
    steps = request.steps or limits.steps
    strength = (request.strength if isinstance(request, EditsRequest) else None) or (0.8 if mask is None else 1.0)
    if image is not None and int(steps * strength) < 1:
        raise wrong("strength", strength, limits)
    return GenerationTask(
        prompt=revised(request.prompt, limits.prompt_prefix),
        seeds=tuple(first + index for index in range(request.n or 1)),
        steps=steps,
        guidance_scale=limits.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        size_px=sizes(limits)[request.size or "auto"],
        negative_prompt=request.negative_prompt or "",
        sampler=request.sampler or "dpmpp_2m",
        image=image,
        strength=strength,
        mask=mask,
        previews=request.partial_images or 0,
        reproducible=bool(request.reproducible),
        adapter=_adapter(request.adapter or request.model),
        tier=request.tier or "full",
        deadline_s=min(request.deadline_s or limits.deadline_s, limits.deadline_s),
        **more,
    )
