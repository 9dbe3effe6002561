"""docs/api.md, of the service's own OpenAPI document."""

import json
import re
from collections.abc import Iterator
from typing import Any

from service.app import create_app
from service.lifecycle import Loaded, Progress
from service.openapi import MEANINGS
from service.settings import Settings

Schema = dict[str, Any]

_PREFIX = "#/components/schemas/"
_TITLES = {
    "inference": "Appends",
    "sessions": "Sessions",
    "models": "Models and capacity",
    "openai": "OpenAI's routes",
    "open inference protocol": "The Open Inference Protocol",
    "operations": "Operations",
}
_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "not empty",
    "maxLength": "{} characters at most",
    "minItems": "not empty",
    "maxItems": "{} items at most",
    "maxProperties": "{} entries at most",
    "pattern": "`{}`",
}
_IN_PATH = ("session_id", "model")
_HEAD = """\
# API

Every route, its parameters, bodies and replies. This page is written by `make reference` from the OpenAPI document that
a running service gives at `/openapi.json`, and shows at `/docs`. For what it all means see [concepts](concepts.md) and
[sessions](sessions.md).

A body is JSON, or a safetensors file where it says so; a reply is what `Accept` asks for. A refusal is a problem
document ([Problem](#problem), RFC 9457) that names the field and the fix; it changes nothing.
"""


def document() -> Schema:
    """What `/openapi.json` answers. No model is loaded for it."""

    def load(progress: Progress) -> Loaded:
        raise RuntimeError("the reference needs no model")

    schema: Schema = create_app(load, Settings()).openapi()
    return schema


def page() -> str:
    """The whole of docs/api.md."""
    schema = document()
    parts = [_HEAD, _refusals(), _headers(schema)]
    for tag, title in _TITLES.items():
        parts.append(f"## {title}\n")
        parts += [_operation(*each) for each in _operations(schema, tag)]
    parts.append("## Objects\n")
    models = schema["components"]["schemas"]
    parts += [_model(name, models[name]) for name in sorted(_named(schema["paths"], models), key=str.lower)]
    return "\n".join(parts)


def _operations(schema: Schema, tag: str) -> Iterator[tuple[str, str, Schema]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            if operation["tags"] == [tag]:
                yield method.upper(), path, operation


def _refusals() -> str:
    lines = ["## Refusals\n", "| status | means |", "| --- | --- |"]
    lines += [f"| {status} | {_cell(meaning)} |" for status, meaning in sorted(MEANINGS.items())]
    return "\n".join(lines) + "\n"


def _headers(schema: Schema) -> str:
    """Those that many routes take, once."""
    taken: dict[str, str] = {}
    for tag in _TITLES:
        for _, _, operation in _operations(schema, tag):
            headers = [each for each in operation.get("parameters", []) if each["in"] == "header"]
            taken |= {each["name"]: _parameter(each) for each in headers}
    lines = ["## Headers\n", "| header | type | meaning |", "| --- | --- | --- |", *taken.values()]
    return "\n".join(lines) + "\n"


def _operation(method: str, path: str, operation: Schema) -> str:
    lines = [f"### `{method} {path}`\n"]
    if operation.get("description"):
        lines.append(operation["description"].strip() + "\n")
    parameters = [each for each in operation.get("parameters", []) if each["name"] not in _IN_PATH]
    queries = [each for each in parameters if each["in"] == "query"]
    if queries:
        lines += ["| query | type | meaning |", "| --- | --- | --- |", *map(_parameter, queries), ""]
    headers = [f"`{each['name']}`" for each in parameters if each["in"] == "header"]
    if headers:
        lines.append(f"[Headers](#headers): {', '.join(headers)}.\n")
    if "requestBody" in operation:
        lines.append(f"Body: {_content(operation['requestBody']['content'])}.\n")
    replies = operation["responses"]
    for status in sorted(status for status in replies if status.startswith("2")):
        body = _content(replies[status].get("content", {}))
        lines.append(f"{status}: {replies[status]['description'].rstrip('.')}{f'; {body}' if body else ''}.\n")
    refused = [status for status in sorted(replies) if status[0] in "45"]
    if refused:
        lines.append(f"Refusals: {', '.join(refused)}.\n")
    return "\n".join(lines)


def _parameter(parameter: Schema) -> str:
    schema = parameter.get("schema") or next(iter(parameter["content"].values()))["schema"]
    meaning = _cell(parameter.get("description") or schema.get("description") or "")
    return f"| `{parameter['name']}` | {_cell(kind(schema))} | {meaning} |"


def _content(content: Schema) -> str:
    """`application/json` of [Name](#name), or ..."""
    told = []
    for media, entry in content.items():
        schema = entry.get("schema") or entry.get("itemSchema") or {}
        of = _streamed(schema) if "itemSchema" in entry else kind(schema)
        told.append(f"`{media}`" + (f" of {of}" if of not in ("anything", "bytes") else ""))
        if schema.get("description") and of == "bytes":
            told[-1] += f" ({schema['description'].rstrip('.')})"
    return ", or ".join(told)


def _streamed(schema: Schema) -> str:
    """The objects that events carry."""
    return " or ".join(kind(each) for each in schema["properties"]["data"]["anyOf"][0]["contentSchema"]["anyOf"])


def _model(name: str, schema: Schema) -> str:
    lines = [f"### {name}\n"]
    if schema.get("description"):
        lines.append(schema["description"].strip() + "\n")
    if "enum" in schema:
        return "\n".join([*lines, "One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + ".\n"])
    required = schema.get("required", [])
    if schema.get("properties"):
        lines += ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
        for field, entry in schema["properties"].items():
            default = "required" if field in required else f"`{_json(entry['default'])}`" if "default" in entry else ""
            meaning = _cell(entry.get("description", ""))
            lines.append(f"| `{field}` | {_cell(kind(entry))} | {default} | {meaning} |")
        lines.append("")
    for example in schema.get("examples", []):
        lines.append(f"```json\n{_json(example)}\n```\n")
    return "\n".join(lines)


def kind(schema: Schema) -> str:
    """What a value of the schema is, in words, its bounds with it."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_PREFIX)
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(kind(each) for each in schema[several]))
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return _plain(schema) + (f" ({', '.join(bounds)})" if bounds else "")


def _plain(schema: Schema) -> str:
    match schema.get("type"):
        case "array":
            return f"list of {kind(schema['items'])}" if schema.get("items") else "list"
        case "object":
            values = schema.get("additionalProperties")
            return f"object of {kind(values)}" if isinstance(values, dict) and values else "object"
        case "string" if schema.get("format") == "binary":
            return "bytes"
        case "string" if schema.get("format") == "date-time":
            return "time"
        case None:
            return "anything"
        case name:
            return str(name)


def _named(part: object, models: Schema) -> set[str]:
    """The models that a part of the document names, and those that they name."""
    found: set[str] = set()
    left: list[Any] = [part]
    while left:
        here = left.pop()
        if isinstance(here, dict):
            name = str(here.get("$ref", "")).removeprefix(_PREFIX)
            if name in models and name not in found:
                found.add(name)
                left.append(models[name])
            left += here.values()
        elif isinstance(here, list):
            left += here
    return found


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
