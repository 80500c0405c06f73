"""Events of a task -> one JSON answer, or the server-sent events of OpenAI's streams.

Place and ETA travel in comments, `: {"position": 2, "eta_s": 7.5}`: clients that do not know them pass them over.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import Any

from serve.errors import ApiError
from serve.task import Backend, Completed, Event, Failed, GenerationTask, Outcome, Picture, Progress, Rejected, Waiting

RETRY_AFTER_S = 5  # while a generator starts
FILTERED = "content_filtered"


def encoded(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")


def failure(outcome: Rejected | Failed) -> ApiError:
    """What a visitor is told of an outcome that is no picture."""
    if isinstance(outcome, Rejected):
        wait = outcome.retry_after_s
        return ApiError(429, f"{outcome.message}; try again in {wait} s", None, "queue_full", "rate_limit_error", wait)
    if outcome.missing:
        return ApiError(404, outcome.message, code="model_not_found")
    if outcome.wrong:
        return ApiError(400, outcome.message, code="invalid_value")
    if outcome.late:
        return ApiError(408, outcome.message, "deadline_s", "deadline_exceeded", "timeout_error")
    if outcome.retry:
        return ApiError(503, outcome.message, code="unavailable", kind="server_error", retry_after_s=RETRY_AFTER_S)
    return ApiError(500, outcome.message, code="generation_failed", kind="server_error")


def filtered(reason: str, param: str | None = None) -> ApiError:
    return ApiError(400, f"{reason}; please ask for something else", param, FILTERED)


async def collect(backend: Backend, task: GenerationTask) -> tuple[list[Picture], Completed]:
    """Wait for everything. Raises ApiError."""
    pictures: dict[int, Picture] = {}
    async with aclosing(backend.generate(task)) as events:
        async for event in events:
            if isinstance(event, Picture):
                pictures[event.index] = event
            elif isinstance(event, Rejected | Failed):
                raise failure(event)
            elif isinstance(event, Completed):
                return [pictures[index] for index in sorted(pictures)], event
    raise failure(Failed("the generator was lost while it painted; try again", retry=True))


def body(task: GenerationTask, pictures: list[Picture], completed: Completed, as_url: bool = False) -> dict[str, Any]:
    """Raises ApiError where every picture is withheld; one of several is an entry that says so."""
    if all(picture.png is None for picture in pictures):
        raise filtered(pictures[0].filtered)
    answer = {
        "created": int(time.time()),
        "model": completed.checkpoint,
        "size": f"{task.size_px}x{task.size_px}",
        "output_format": "png",
        "data": [_entry(task, picture, as_url) for picture in pictures],
    }
    return answer | ({"trace": list(completed.ticks)} if task.trace else {})


def _entry(task: GenerationTask, picture: Picture, as_url: bool) -> dict[str, Any]:
    about = {"revised_prompt": task.prompt, "seed": task.seeds[picture.index], "checkpoint": picture.checkpoint}
    if picture.png is None:
        return {**about, "finish_reason": FILTERED, "filtered": picture.filtered}
    text = encoded(picture.png)
    return ({"url": f"data:image/png;base64,{text}"} if as_url else {"b64_json": text}) | about


async def stream(events: AsyncIterable[Event], task: GenerationTask) -> AsyncIterator[bytes]:
    """Server-sent events: `image_generation.*`, or `image_edit.*` where a picture was sent."""
    name = "image_generation" if task.image is None else "image_edit"
    shown = 0
    async for event in events:
        if isinstance(event, Waiting):
            yield f": {json.dumps({'position': event.position, 'eta_s': event.eta_s})}\n\n".encode()
        elif isinstance(event, Progress) and event.preview is not None:
            fields = {"partial_image_index": shown, "step": event.done, "steps": event.total}
            yield sent(f"{name}.partial_image", _shown(task, event.preview, event.index) | fields)
            shown += 1
        elif isinstance(event, Picture) and event.png is not None:
            more = {"checkpoint": event.checkpoint, "usage": _NO_TOKENS}
            yield sent(f"{name}.completed", _shown(task, event.png, event.index) | more)
        elif isinstance(event, Picture):
            yield failed(filtered(event.filtered))
        elif isinstance(event, Rejected | Failed):
            yield failed(failure(event))
        elif isinstance(event, Completed) and task.trace:
            yield f": {json.dumps({'trace': event.ticks})}\n\n".encode()


_NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def _shown(task: GenerationTask, png: bytes, index: int) -> dict[str, Any]:
    return {
        "b64_json": encoded(png),
        "created_at": int(time.time()),
        "size": f"{task.size_px}x{task.size_px}",
        "quality": "auto",
        "background": "opaque",
        "output_format": "png",
        "revised_prompt": task.prompt,
        "seed": task.seeds[index],
    }


def sent(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


def failed(error: ApiError) -> bytes:
    """The stream's last event where no picture comes."""
    return sent("error", error.body())


def outcome_of(event: Event) -> Outcome | None:
    return event if isinstance(event, Completed | Rejected | Failed) else None
