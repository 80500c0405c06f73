"""The OpenAPI document of what this server really takes and gives: served at /openapi.json, tested against the server."""

from __future__ import annotations

from typing import Any

from momalisa import config
from serve import wire

JSON = "application/json"
EVENTS = [f"image_{what}.{state}" for what in ("generation", "edit") for state in ("partial_image", "completed")]
EVENT = {
    "type": "object",
    "properties": {"event": {"enum": [*EVENTS, "error"]}, "data": {"type": "string", "contentMediaType": JSON}},
    "required": ["event", "data"],
}
STREAM = {"text/event-stream": {"schema": EVENT}}
ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
DEBUG = {
    "name": "debug",
    "in": "query",
    "required": False,
    "schema": {"type": "string"},
    "description": "trace: the answer tells every tick that the request took part in",
}
VOTE = {"type": "object", "properties": {"better": {"enum": ["first", "second"]}}, "required": ["better"]}
JOB_STATES = ["queued", "running", "completed", "failed", "cancelled"]


def document(limits: config.Serve, closed: bool) -> dict[str, Any]:
    """OpenAPI 3.1. `closed`: API keys are needed."""
    files = {"image": _file("the picture"), "mask": _file("transparent where to paint again")}
    edit = {"type": "object", "properties": _form_fields(limits) | files, "required": ["image", "prompt"]}
    generation = {"type": "object", "properties": _fields(limits, wire.ImagesRequest), "required": ["prompt"]}
    words, form = {JSON: {"schema": generation}}, {"multipart/form-data": {"schema": edit}}
    pictures = _answer("pictures, or a stream of events where `stream` is true", "Images")
    pictures["content"] |= STREAM
    missing = frozenset({"404"})  # an adapter
    generate = _painting("generate", "Paint from words", pictures, words, [DEBUG], errors=missing)
    change = _painting("edit", "Paint a picture again, or a part of it", pictures, form, [DEBUG], errors=missing)
    job, events = _answer("the job", "Job"), {"description": "events", "content": STREAM}
    text = {"description": "metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}
    health = _operation("health", "Whether pictures can be painted", _answer("yes", "Health"), open_=True)
    paths: dict[str, Any] = {
        "/v1/images/generations": {"post": generate},
        "/v1/images/edits": {"post": change},
        "/v1/models": {"get": _operation("models", "What paints", _answer("the served checkpoint, then its adapters", "Models"))},
        "/v1/models/{id}": {"get": _operation("model", "One of them", _answer("it is there", "Model"), [ID], {"404"})},
        "/v1/jobs": {"post": _painting("start_job", "Paint later: JSON, or a form as for edits", job, words | form, [], "202")},
        "/v1/jobs/{id}": {
            "get": _operation("job", "A job, and its pictures when it is done", job, [ID], {"404", "410"}),
            "delete": _operation("cancel_job", "End a job; twice is once", job, [ID], {"404", "410"}),
        },
        "/v1/jobs/{id}/events": {"get": _operation("job_events", "A job's events as a stream", events, [ID], {"404", "410"})},
        **_comparisons(limits),
        "/healthz": {"get": health},
        "/metrics": {"get": _operation("metrics", "Prometheus' text", text)},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "MOMA Lisa", "version": "1", "description": "OpenAI's images API, with more to say."},
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    } | ({"security": [{"key": []}]} if closed else {})


def _comparisons(limits: config.Serve) -> dict[str, Any]:
    fields = {name: one for name, one in _fields(limits, wire.ImagesRequest).items() if name not in wire.NOT_COMPARED}
    words = {JSON: {"schema": {"type": "object", "properties": fields, "required": ["prompt"]}}}
    pair = _answer("two pictures, not saying whose", "Comparison")
    vote = _operation("vote", "Say which is better, once", _answer("whose they were", "Vote"), [ID], {"400", "404", "408", "413"})
    vote |= {"requestBody": {"required": True, "content": {JSON: {"schema": VOTE}}}}
    errors = frozenset({"409"})
    return {
        "/v1/comparisons": {"post": _painting("compare", "Paint the same by two checkpoints", pair, words, [], errors=errors)},
        "/v1/comparisons/{id}/vote": {"post": vote},
    }


def _operation(
    id_: str,
    summary: str,
    answer: dict[str, Any],
    parameters: list[dict[str, Any]] | None = None,
    errors: set[str] | None = None,
    status: str = "200",
    open_: bool = False,
) -> dict[str, Any]:
    codes = (errors or set()) | {"503"} | (set() if open_ else {"401", "403", "429"})
    responses = {status: answer} | {code: _answer("why not", "Error") for code in sorted(codes)}
    operation: dict[str, Any] = {"operationId": id_, "summary": summary, "parameters": parameters or [], "responses": responses}
    return operation | ({"security": []} if open_ else {})


def _painting(
    id_: str,
    summary: str,
    answer: dict[str, Any],
    body: dict[str, Any],
    parameters: list[dict[str, Any]],
    status: str = "200",
    errors: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    operation = _operation(id_, summary, answer, parameters, {"400", "408", "413", "500", *errors}, status)
    return operation | {"requestBody": {"required": True, "content": body}}


def _answer(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _fields(limits: config.Serve, kind: type[wire.ImagesRequest]) -> dict[str, Any]:
    """The fields of a request, with this server's own limits and its words for them."""
    properties: dict[str, Any] = kind.model_json_schema()["properties"]
    for name, rule in wire.rules(limits).items():
        if name in properties:
            properties[name] = {key: value for key, value in properties[name].items() if key not in ("title", "default")}
            properties[name]["description"] = rule
    most = limits.max_prompt_chars + len(limits.prompt_prefix)  # a picture's file says the whole prompt
    properties["prompt"] = {"type": "string", "minLength": 1, "maxLength": most, "pattern": r"\S"}
    properties["negative_prompt"] = {"type": ["string", "null"], "maxLength": limits.max_prompt_chars}
    properties["adapter"] |= {"pattern": wire.ADAPTER, "type": ["string", "null"]}
    del properties["adapter"]["anyOf"]
    properties["n"] = {"type": ["integer", "null"], "minimum": 1, "maximum": limits.max_pictures_per_request}
    properties["size"] = {"enum": [*wire.sizes(limits), None]}
    properties["tier"] = {"enum": ["full", *limits.tiers, None]}
    return properties


def _form_fields(limits: config.Serve) -> dict[str, Any]:
    """The same as a form says them: no nulls."""
    fields = _fields(limits, wire.EditsRequest)
    for name, schema in fields.items():
        kinds = [one for one in schema.get("anyOf", []) if one.get("type") != "null"]
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        fields[name] = {**kinds[0], **rest} if kinds else rest
        if isinstance(rest.get("type"), list):
            fields[name]["type"] = rest["type"][0]
        if "enum" in fields[name]:
            fields[name]["enum"] = [value for value in fields[name]["enum"] if value is not None]
    return fields


def _file(description: str) -> dict[str, Any]:
    return {"type": "string", "format": "binary", "description": description}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


def _schemas() -> dict[str, Any]:
    text, whole, number = {"type": "string"}, {"type": "integer"}, {"type": "number"}
    maybe = {"type": ["string", "null"]}
    error = _object("message type param code", message=text, type=text, param=maybe, code=maybe)
    picture = _object(
        "revised_prompt seed checkpoint", b64_json=text, url=text, revised_prompt=text, seed=whole, checkpoint=text,
        finish_reason={"const": "content_filtered"}, filtered=text,
    )  # fmt: skip
    about = {"id": text, "object": {"const": "model"}, "created": whole, "owned_by": text, "parent": text}
    return {
        "Error": _object("error", error=error),
        "Images": _object(
            "created model size output_format data", created=whole, model=text, size=text, output_format={"const": "png"},
            data={"type": "array", "items": picture, "minItems": 1}, trace={"type": "array", "items": {"type": "object"}},
        ),
        "Model": _object("id object created owned_by", **about),
        "Models": _object(
            "object data", object={"const": "list"}, data={"type": "array", "items": {"$ref": "#/components/schemas/Model"}}
        ),
        "Job": _object(
            "id object created status", id=text, object={"const": "image.job"}, created=whole, status={"enum": JOB_STATES},
            position=whole, eta_s=number, result={"$ref": "#/components/schemas/Images"}, error=error,
        ),
        "Comparison": _object(
            "id object created revised_prompt seed data", id=text, object={"const": "image.comparison"}, created=whole,
            revised_prompt=text, seed=whole,
            data={"type": "array", "items": _object("b64_json", b64_json=text), "minItems": 2, "maxItems": 2},
        ),
        "Vote": _object("object better other", object={"const": "image.vote"}, better=text, other=text),
        "Health": _object(
            "status checkpoint trial problem challenger picture_check", status={"const": "ok"}, checkpoint=text, trial=maybe,
            problem=maybe, challenger=maybe, picture_check=text,
        ),
    }  # fmt: skip
