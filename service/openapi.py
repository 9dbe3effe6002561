"""The pieces of the OpenAPI document that FastAPI cannot see, since routes read their bodies themselves."""

import inspect
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from keypast import oip, openai_schemas, schemas
from keypast.wire import JSON_TYPE, MERGE_PATCH_TYPE, OCTETS_TYPE, SAFETENSORS_TYPE
from service.errors import PROBLEM_TYPE
from service.streams import EVENT_STREAM

Documented = dict[int | str, dict[str, Any]]

_REFS = "#/components/schemas/"
MEANINGS = {
    401: "No valid API key, where the service has keys.",
    403: "The key is valid, and not for this.",
    400: "The body is not JSON, or not a safetensors file.",
    404: "No such session, or another tenant's.",
    409: "The session is not in a state for this, or its id is taken; not to be sent again.",
    410: "The session was there and is gone; `reason` says why.",
    412: "The version or the length has moved, or (`reply_dropped`) this was done before and its reply was too large "
    "to keep; the present version and length are in the body. Nothing was done now.",
    413: "The body is too large.",
    415: "Neither JSON nor safetensors.",
    422: "A value, shape or dtype is wrong, or too long; `field` names it.",
    429: "A quota is used up, too much waits, or no memory came free; try again after `Retry-After`. Nothing was done.",
    500: "The model failed; the session is as before.",
    503: "Loading, draining or down, or too much is being sent just now; try again after `Retry-After`. Nothing was "
    "done.",
}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, where the service has keys."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
_APPEND_OPTIONS = ("logits", "top_logprobs", "token_logprobs", "sample", "need_weights", "average_attn_weights")

IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "description": 'The version expected, as `ETag` gave it: `"3"`.',
    "schema": {"type": "string"},
}
LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "The `id` of the last event that was read; the stream goes on after it.",
    "schema": {"type": "string"},
}
KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Names this request, 1 to 255 visible ASCII characters. Sent again with the same key and body, it "
    "is not done again: the first reply comes again, with `Idempotent-Replayed: true`; with another body it is refused "
    "(422). A session knows its last 64 keys.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
GUARDS = [IF_MATCH, KEY]
SESSION_NAME = {
    "name": "X-Session-ID",
    "in": "header",
    "required": False,
    "description": "As `session_id` in the body; a session that is not there is made.",
    "schema": {"type": "string", "pattern": schemas.SESSION_ID_PATTERN},
}
REPLAYED_HEADER = {
    "Idempotent-Replayed": {
        "description": "`true` when the request was done before and this is its reply again; else it is not there.",
        "schema": {"type": "string", "enum": ["true"]},
    }
}
VERSION_HEADERS = {"ETag": {"description": 'The session\'s version, quoted: `"3"`.', "schema": {"type": "string"}}}
_SCALARS = {
    "Keypast-Version": "version",
    "Keypast-Past-Length": "past_length",
    "Keypast-Valid-Length": "valid_length",
    "Keypast-Computed": "computed",
    "Keypast-Reused": "reused",
    "Keypast-Shared": "shared",
    "Keypast-Queue-Ms": "timings.queue_ms",
    "Keypast-Compute-Ms": "timings.compute_ms",
}
APPEND_HEADERS = {
    **VERSION_HEADERS,
    **REPLAYED_HEADER,
    **{
        name: {"description": f"`{field}`, for those who do not read the body.", "schema": {"type": "string"}}
        for name, field in _SCALARS.items()
    },
}
BINARY = {"type": "string", "format": "binary"}
BATCH = BINARY | {
    "description": "The list as JSON in the tensor `items`, uint8, without its tensors; those are in the file, item "
    "3's query as `3.query`."
}
PAST = BINARY | {
    "description": "B rows, N key/value heads, d channels a head, T slots: `key_past.{layer}` (B, N, d, T) and "
    "`value_past.{layer}` (B, N, T, d), float16 or float32; `batch_valid_length` (B,) int32; `token_ids` (B, T) int64 "
    "of models that keep them. Metadata: `format`, `kind`, `fingerprint`, `digest`."
}


TENSORS = BINARY | {
    "description": f"JSON, `{oip.HEADER}` bytes long, then the bytes of the tensors that have `parameters.{oip.SIZE}`, "
    "in their order."
}


def ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFS + model.__name__}


def reply(model: type[BaseModel], description: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": description, "headers": headers or {}, "content": {JSON_TYPE: {"schema": ref(model)}}}


def event_stream(*told: type[BaseModel]) -> dict[str, Any]:
    """Content of server-sent events, the `data` of each JSON of one of these, or [DONE]."""
    read = {"type": "string", "contentMediaType": JSON_TYPE, "contentSchema": {"anyOf": [ref(each) for each in told]}}
    fields = {"data": {"anyOf": [read, {"const": "[DONE]"}]}, "event": {"type": "string"}, "id": {"type": "string"}}
    return {EVENT_STREAM: {"itemSchema": {"type": "object", "required": ["data"], "properties": fields}}}


def problems(*statuses: int) -> Documented:
    """These, and one entry for all others."""
    content = {PROBLEM_TYPE: {"schema": ref(schemas.Problem)}}
    named: Documented = {status: {"description": MEANINGS[status], "content": content} for status in statuses}
    return {**named, "default": {"description": "Any other refusal.", "content": content}}


def refusals(*statuses: int) -> Documented:
    """As `problems`, in the Open Inference Protocol's words."""
    content = {JSON_TYPE: {"schema": ref(oip.Refusal)}}
    named: Documented = {status: {"description": MEANINGS[status], "content": content} for status in statuses}
    return {**named, "default": {"description": "Any other refusal.", "content": content}}


def json_request(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": ref(model)}}}}


def patch_request(model: type[BaseModel]) -> dict[str, Any]:
    document = json_request(model)
    document["requestBody"]["content"][MERGE_PATCH_TYPE] = {"schema": ref(model)}
    return {**document, "parameters": [IF_MATCH]}


def append_request(model: type[BaseModel]) -> dict[str, Any]:
    """Both media types; the options of a safetensors body are query parameters, their values JSON texts."""
    document = json_request(model)
    document["requestBody"]["content"][SAFETENSORS_TYPE] = {"schema": BINARY}
    schema = model.model_json_schema(ref_template=_REFS + "{model}")["properties"]
    parameters = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": f"As in the JSON body; only with {SAFETENSORS_TYPE}.",
            "content": {JSON_TYPE: {"schema": schema[name]}},
        }
        for name in _APPEND_OPTIONS
    ]
    return {**document, "parameters": [*GUARDS, *parameters]}


def batch_request() -> dict[str, Any]:
    document = json_request(schemas.BatchSteps)
    document["requestBody"]["content"][SAFETENSORS_TYPE] = {"schema": BATCH}
    return {**document, "parameters": [KEY]}


def batch_reply() -> dict[str, Any]:
    document = reply(schemas.BatchOutcomes, "What became of each, in the order asked for.")
    document["content"][SAFETENSORS_TYPE] = {"schema": BATCH}
    return document


def infer_request() -> dict[str, Any]:
    document = json_request(oip.InferRequest)
    document["requestBody"]["content"][OCTETS_TYPE] = {"schema": TENSORS}
    size = {"description": "Bytes of JSON that the body begins with, where tensors' bytes follow."}
    header = {"name": oip.HEADER, "in": "header", "required": False, "schema": {"type": "integer"}, **size}
    return {**document, "parameters": [*GUARDS, header]}


def infer_reply() -> dict[str, Any]:
    document = reply(oip.InferReply, "The outputs.", APPEND_HEADERS)
    document["content"][OCTETS_TYPE] = {"schema": TENSORS}
    return document


def past_request() -> dict[str, Any]:
    content = {SAFETENSORS_TYPE: {"schema": PAST}}
    return {"requestBody": {"required": True, "content": content}, "parameters": GUARDS}


def past_reply() -> dict[str, Any]:
    content = {SAFETENSORS_TYPE: {"schema": PAST}}
    return {"description": "The past.", "headers": VERSION_HEADERS, "content": content}


def append_reply() -> dict[str, Any]:
    document = reply(schemas.AppendReply, "Appended.", APPEND_HEADERS)
    document["content"][SAFETENSORS_TYPE] = {"schema": BINARY}
    return document


def install(app: FastAPI, public: Iterable[str]) -> None:
    """Makes `app.openapi()` know every wire model, and that all but the `public` paths ask for a key."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(_wire_schemas())
            components["securitySchemes"] = _SECURITY
            document["security"] = [{name: []} for name in _SECURITY]
            for path in public:
                document["paths"][path]["get"]["security"] = []
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents


def _wire_schemas() -> dict[str, Any]:
    models = [
        model
        for module in (schemas, openai_schemas, oip)
        for _, model in inspect.getmembers(module, inspect.isclass)
        if issubclass(model, BaseModel) and model.__module__ == module.__name__
    ]
    _, document = models_json_schema([(model, "validation") for model in models], ref_template=_REFS + "{model}")
    schemas_by_name: dict[str, Any] = document["$defs"]
    return schemas_by_name
