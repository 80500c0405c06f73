"""OpenAI's images API on the wire: what a request may say, and errors in its shape.

Beside OpenAI's own fields a request may hold `seed`, `steps`, `guidance_scale` and `negative_prompt`. Fields that
mean nothing here (`user`, `quality`, `background`, ...) are ignored, and `model` may be anything: the answer says
which checkpoint painted.
"""

from __future__ import annotations

import json
import random
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from momalisa import config
from serve.work import Commission

MAX_BODY_BYTES = 1_000_000
MAX_SEED = 2**53 - 1  # the largest whole number that JavaScript keeps exact
MAX_STEPS = 100
MAX_GUIDANCE_SCALE = 30


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def _encodable(text: str) -> str:
    text.encode()  # UnicodeEncodeError, a ValueError, for an unpaired surrogate: no tokenizer and no answer can hold it
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class ImagesRequest(BaseModel):
    """The fields that mean something here, with the limits that hold everywhere; null is the same as absent."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    prompt: Text
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, le=MAX_GUIDANCE_SCALE)] | None = None
    negative_prompt: Text | None = None


def sizes(limits: config.Serve) -> dict[str, int]:
    """The sizes a visitor may ask for: the model's own, three quarters and half of it, where these are multiples of 8."""
    sides = (side for side in (limits.size_px, limits.size_px * 3 // 4, limits.size_px // 2) if side % 8 == 0)
    return {"auto": limits.size_px} | {f"{side}x{side}": side for side in sides}


def _rules(limits: config.Serve) -> dict[str, str]:
    """For every field, what it must be: the second half of an error message."""
    text = f"text (valid Unicode) of at most {limits.max_prompt_chars} characters"
    return {
        "prompt": f"{text}, and not empty",
        "model": "text",
        "n": f"a whole number from 1 to {limits.max_pictures_per_request}",
        "size": "one of " + ", ".join(sizes(limits)),
        "response_format": "b64_json or url (a data: URL)",
        "output_format": "png",
        "stream": "false: this server answers once, with finished pictures",
        "seed": f"a whole number from 0 to {MAX_SEED}",
        "steps": f"a whole number from 1 to {MAX_STEPS}",
        "guidance_scale": f"a number from 1 to {MAX_GUIDANCE_SCALE}",
        "negative_prompt": text,
    }


def parse(body: bytes, limits: config.Serve) -> ImagesRequest:
    """Raises ApiError (400) naming the field, the value and the rule."""
    fields = {name: value for name, value in _json_object(body).items() if name in ImagesRequest.model_fields}
    if "prompt" not in fields:
        raise ApiError(400, f"prompt is missing: it must be {_rules(limits)['prompt']}", "prompt", "missing_required_parameter")
    try:
        request = ImagesRequest.model_validate(fields)
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
        raise _wrong(name, fields[name], limits) from None
    if not request.prompt.strip():
        raise ApiError(400, "prompt is empty: say what the artwork should show, such as 'a coffee'", "prompt", "invalid_value")
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            message = f"{name} has {len(text)} characters: at most {limits.max_prompt_chars} are allowed; shorten it"
            raise ApiError(400, message, name, "string_above_max_length")
    if request.n is not None and request.n > limits.max_pictures_per_request:
        raise _wrong("n", request.n, limits)
    if request.size is not None and request.size not in sizes(limits):
        raise _wrong("size", request.size, limits)
    return request


def _wrong(name: str, value: Any, limits: config.Serve) -> ApiError:
    shown = json.dumps(value)  # ASCII: an unpaired surrogate cannot travel in a UTF-8 answer
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return ApiError(400, f"{name} must be {_rules(limits)[name]}; got {shown}", name, "invalid_value")


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not JSON{where}; send something like {_EXAMPLE}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object such as {_EXAMPLE}", code="invalid_json")
    return value


_EXAMPLE = '{"prompt": "a coffee"}'


def revised(prompt: str, prefix: str) -> str:
    """The prompt as the model is asked: the prefix it was trained with, unless the visitor typed it."""
    text = prompt.strip()
    return text if text.lower().startswith(prefix.strip().lower()) else prefix + text


def commission(request: ImagesRequest, limits: config.Serve) -> Commission:
    """A valid request with every default filled in; without a seed, a random one."""
    first = request.seed if request.seed is not None else random.SystemRandom().randrange(2**32)
    return Commission(
        prompt=revised(request.prompt, limits.prompt_prefix),
        seeds=tuple(first + index for index in range(request.n or 1)),
        steps=request.steps or limits.steps,
        guidance_scale=limits.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        size_px=sizes(limits)[request.size or "auto"],
        negative_prompt=request.negative_prompt or "",
    )
