"""Whether the service keeps to its own OpenAPI document, over models of both kinds: Schemathesis makes requests of what
the document says, right ones and wrong ones, and holds every reply against it. And none is a 5xx.

/v1/events is left out, whose replies have no end, and so is drain, which ends the service.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from keypast.keys import new_key
from keypast.wire import OCTETS_TYPE, SAFETENSORS_TYPE
from tests.e2e.test_server import Server
from tests.tiny import save_tiny_decoder

KEY, RECORD = new_key("ops", "admin")
HEADERS = {"Authorization": f"Bearer {KEY}"}
MODELS = ["tiny", "layer"]
LEFT_OUT = ["/v1/events", "/v1/admin/drain"]
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@schemathesis.serializer(SAFETENSORS_TYPE, OCTETS_TYPE)
def as_it_is(context: object, body: object) -> bytes:
    return body if isinstance(body, bytes) else str(getattr(body, "data", body)).encode()


@dataclass(frozen=True)
class Documented:
    """A service over a decoder and an attention layer, and what it says of itself."""

    address: str
    schema: Any

    def sessions(self) -> list[str]:
        """New ones, one of each kind, five and two positions long; those that were there are gone."""
        with httpx.Client(base_url=self.address, headers=HEADERS, timeout=30) as client:
            for view in client.get("/v1/sessions", params={"limit": 1000}).json()["data"]:
                client.delete(f"/v1/sessions/{view['id']}")
            made = [client.post("/v1/sessions", json={"model": model}).json()["id"] for model in MODELS]
            for session, body in zip(made, ({"token_ids": [[5] * 5]}, layer_inputs(2, 2)), strict=True):
                assert client.post(f"/v1/sessions/{session}/prefill", json=body).status_code == 200
        return made

    def holds(self, case: Any) -> int:
        """The status of the reply, which is as documented."""
        case.headers.pop("X-API-Key", None)
        reply = case.call(headers=HEADERS, timeout=60)
        case.validate_response(reply, checks=CHECKS)
        status: int = reply.status_code
        return status


def layer_inputs(n: int, present: int) -> dict[str, Any]:
    tensor = {"dtype": "float32", "shape": [1, n, 8], "data": [0.5] * n * 8}
    mask = {"dtype": "bool", "shape": [1, n, present], "data": [True] * n * present}
    return {**dict.fromkeys(("query", "key", "value"), tensor), "attention_mask": mask}


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Documented]:
    models = {"tiny": str(save_tiny_decoder(tmp_path_factory.mktemp("tiny"))), "layer": "attention:hidden=8,heads=2"}
    told = {"models": json.dumps(models), "kv_memory": "16MiB", "attention_backend": "sdpa", "wait_seconds": "0.2"}
    with Server("service", keys=RECORD.line(), **told) as server:
        address = server.address()
        yield Documented(address, schemathesis.openapi.from_url(f"{address}/openapi.json", headers=HEADERS))


def operations(schema: Any) -> list[Any]:
    return [found.ok() for found in schema.get_all_operations() if found.ok().path not in LEFT_OUT]


def fuzz(documented: Documented, examples: int) -> Counter[int]:
    """So many right and so many wrong requests of each operation, most of them to sessions and models that are there.
    How often which status came."""
    told: Counter[int] = Counter()
    quiet = settings(max_examples=examples, database=None, phases=[Phase.generate], derandomize=True)
    for operation in operations(documented.schema):
        sessions, models = documented.sessions(), [*MODELS, None]
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
                continue  # nothing of it can be wrong

            @settings(quiet, suppress_health_check=list(HealthCheck))
            @given(
                operation.as_strategy(generation_mode=mode), st.sampled_from([*sessions, None]), st.sampled_from(models)
            )
            def one(case: Any, session: str | None, model: str | None) -> None:
                for fields in (case.path_parameters, case.body):
                    if isinstance(fields, dict):
                        named = {"session_id": session, "model": model}
                        fields |= {name: there for name, there in named.items() if there and name in fields}
                told[documented.holds(case)] += 1

            one()
    return told


def test_a_few_of_every_operation(documented: Documented) -> None:
    assert len(operations(documented.schema)) > 30
    assert {200, 400, 404, 422} <= set(fuzz(documented, 1))


@pytest.mark.slow
def test_many_of_every_operation(documented: Documented) -> None:
    assert {200, 201, 400, 404, 410, 422} <= set(fuzz(documented, 60))


# What both kinds answer when all is right: path, method, a body for the decoder's session and one for the layer's
Body = dict[str, Any]
RIGHT: list[tuple[str, str, Body | None, Body | None]] = [
    ("/prefill", "POST", {"text": "hello", "logits": "last", "top_logprobs": 2}, layer_inputs(2, 4)),
    ("/step", "POST", {"token_ids": [[7]], "sample": {"temperature": 0}}, layer_inputs(1, 5) | {"need_weights": True}),
    ("/score", "POST", {"token_ids": [[7, 8]], "token_logprobs": True}, layer_inputs(2, 7)),
    ("/generate", "POST", {"max_tokens": 3}, None),
    ("/generate", "POST", {"max_tokens": 3, "stream": True, "logprobs": True}, None),
    ("/fork", "POST", {"count": 2}, {"at": 2}),
    ("/truncate", "POST", {"length": 4}, {"length": [2]}),
    ("", "GET", {}, {}),
    ("", "PATCH", {"labels": {"a": "b"}}, {"pinned": True}),
    ("/past", "GET", {}, {}),
    ("", "DELETE", {}, {}),
]


def test_what_is_right_is_answered_as_documented(documented: Documented) -> None:
    schema, sessions = documented.schema, documented.sessions()
    for verb, method, *bodies in RIGHT:
        operation = schema[f"/v1/sessions/{{session_id}}{verb}"][method]
        for session, body in zip(sessions, bodies, strict=True):
            if body is None:
                continue
            sent = {"body": body, "media_type": "application/json"} if operation.body else {}
            case = operation.Case(path_parameters={"session_id": session}, **sent)
            assert documented.holds(case) in (200, 201), (verb, method)
    asked = {"model": "tiny", "max_tokens": 3}
    for path, more in (("/completions", {"prompt": "hello"}), ("/chat/completions", {"messages": [MESSAGE]})):
        for stream in (False, True):
            body = {**asked, **more, "stream": stream, "n": 2}
            case = schema[f"/v1{path}"]["POST"].Case(body=body, media_type="application/json")
            assert documented.holds(case) == 200


MESSAGE = {"role": "user", "content": "hello"}
