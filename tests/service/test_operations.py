"""Loading, health, request ids, logs, the OpenAPI document."""

import asyncio
import logging
import threading
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from engine.errors import InvalidInput
from keypast import schemas
from service.app import create_app
from service.lifecycle import Loaded, Progress
from service.settings import Settings
from tests.service.conftest import Running, until
from tests.service.fakes import KINDS, Fakes, Kind

pytestmark = pytest.mark.anyio

KEYED = [
    ("", "post"),
    ("/{session_id}", "delete"),
    ("/{session_id}/past", "put"),
    *((f"/{{session_id}}/{verb}", "post") for verb in ("prefill", "step", "generate", "fork", "truncate")),
]


async def test_while_loading_only_liveness_is_200() -> None:
    go_on = threading.Event()
    fakes = Fakes.build()

    def load(progress: Progress) -> Loaded:
        progress("smollm2: reading weights")
        assert go_on.wait(20)
        return fakes.loaded()

    app = create_app(load, Settings())
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://k")
    async with app.router.lifespan_context(app), client:
        await until(lambda: app.state.service.progress != "starting")
        assert (await client.get("/livez")).json() == {"status": "ok"}
        for path in ("/readyz", "/health"):
            reply = await client.get(path)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            assert reply.json() == {"status": "loading", "detail": "smollm2: reading weights"}
        for reply in (
            await client.get("/v1/models"),
            await client.post("/v1/sessions", json={"model": "echo"}),
            await client.post("/v1/sessions/a/step", json={}),
        ):
            assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "not_ready", "1")
        go_on.set()
        await app.state.service.loaded()
        assert (await client.get("/readyz")).json() == {"status": "ready"}


async def test_when_loading_fails_it_never_gets_ready() -> None:
    def load(progress: Progress) -> Loaded:
        raise InvalidInput("model", "no such file: /secret/path")

    app = create_app(load, Settings())
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://k")
    async with app.router.lifespan_context(app), client:
        with pytest.raises(InvalidInput):
            await app.state.service.loaded()
        reply = await client.get("/readyz")
        assert (reply.status_code, reply.json()) == (503, {"status": "down", "detail": "loading failed"})


async def test_a_stop_while_loading_is_at_once() -> None:
    go_on = threading.Event()

    def load(progress: Progress) -> Loaded:
        assert go_on.wait(20)
        return Fakes.build().loaded()

    app = create_app(load, Settings())
    async with app.router.lifespan_context(app):
        await app.state.service.stop()
    go_on.set()
    await app.state.service.loaded()
    assert app.state.service.status == "loading", "what came too late was not started"


async def test_version_and_docs(running: Running) -> None:
    assert (await running.client.get("/version")).json()["version"]
    assert "text/html" in (await running.client.get("/docs")).headers["content-type"]


async def test_head_answers_as_get(running: Running) -> None:
    session_id = await running.session("echo")
    for path in ("/livez", "/readyz", "/health", "/version", "/v1/models", f"/v1/sessions/{session_id}"):
        head, get = await running.client.head(path), await running.client.get(path)
        assert (head.status_code, head.headers["content-length"]) == (200, get.headers["content-length"])


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2:3", True), ("a b", False), ("x" * 129, False), ("ü", False), ("", False)]
)
async def test_request_ids(running: Running, given: str, kept: bool) -> None:
    headers = {"x-request-id": given.encode()}
    reply = await running.client.get("/v1/sessions/nobody", headers=headers)  # type: ignore[arg-type]
    assert (reply.headers["x-request-id"] == given) == kept
    assert reply.json()["request_id"] == reply.headers["x-request-id"]
    again = await running.client.get("/livez", headers=headers)  # type: ignore[arg-type]
    assert kept or again.headers["x-request-id"] != reply.headers["x-request-id"]


async def test_one_line_a_request_and_never_its_text(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    path = f"/v1/sessions/{await running.session('letters')}"
    with caplog.at_level(logging.DEBUG, "keypast"):
        body = {"text": "my secret", "sample": {}}
        await running.client.post(
            f"{path}/prefill", json=body, headers={"x-request-id": "r1"}, params={"q": "my secret"}
        )
        await running.client.post(f"{path}/prefill", json=body, headers={"x-request-id": "r2"})
    lines = [record.getMessage() for record in caplog.records if record.name == "keypast.access"]
    assert [line.split()[:4] for line in lines] == [
        ["r1", "POST", f"{path}/prefill", "422"],
        ["r2", "POST", f"{path}/prefill", "200"],
    ]
    assert all(line.endswith(" ms") for line in lines)
    assert "secret" not in caplog.text


async def test_what_nobody_foresaw_is_a_500_without_internals(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    @running.app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("/secret/path")

    reply = await running.client.get("/boom", headers={"x-request-id": "r1"})
    assert (reply.status_code, reply.json()["code"], reply.json()["request_id"]) == (500, "internal", "r1")
    assert "/secret" not in reply.text
    assert "/secret/path" in caplog.text, "the operator is told"


# ---- the OpenAPI document --------------------------------------------------------------------------------------------


async def document(running: Running) -> dict[str, Any]:
    reply = await running.client.get("/openapi.json")
    found: dict[str, Any] = reply.json()
    return found


def references(part: object) -> set[str]:
    if isinstance(part, dict):
        own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
        return own.union(*map(references, part.values()))
    return set().union(*map(references, part)) if isinstance(part, list) else set()


async def test_every_reference_leads_somewhere(running: Running) -> None:
    found = await document(running)
    schemas_there = {f"#/components/schemas/{name}" for name in found["components"]["schemas"]}
    assert references(found) <= schemas_there
    for name in ("PrefillRequest", "SessionView", "StreamToken", "Problem"):
        assert f"#/components/schemas/{name}" in schemas_there
    assert "HTTPValidationError" not in str(found)


async def test_every_route_documents_its_bodies_and_refusals(running: Running) -> None:
    found = await document(running)
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            if method == "post" and path != "/v1/admin/drain":  # which says all by its path
                assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"], path
            if path.startswith("/v1"):
                assert "application/problem+json" in operation["responses"]["default"]["content"], path
    step = found["paths"]["/v1/sessions/{session_id}/step"]["post"]
    for body in (step["requestBody"], step["responses"]["200"]):
        assert set(body["content"]) == {"application/json", "application/vnd.safetensors"}
    assert {"400", "404", "409", "410", "412", "413", "415", "422", "429", "500", "503"} <= set(step["responses"])
    assert {"session_id", "If-Match", "logits", "sample"} <= {parameter["name"] for parameter in step["parameters"]}
    export, load = (found["paths"]["/v1/sessions/{session_id}/past"][method] for method in ("get", "put"))
    for body in (export["responses"]["200"], load["requestBody"]):
        assert set(body["content"]) == {"application/vnd.safetensors"}
    assert {"404", "410", "412", "422", "429", "500", "503"} <= set(export["responses"])
    assert {"400", "404", "409", "410", "412", "413", "415", "422", "429", "500", "503"} <= set(load["responses"])
    assert {parameter["name"] for parameter in export["parameters"]} == {"session_id", "If-Match"}
    for path, method in KEYED:
        operation = found["paths"][f"/v1/sessions{path}"][method]
        assert "Idempotency-Key" in {parameter["name"] for parameter in operation["parameters"]}, path
        assert "Idempotent-Replayed" in next(iter(operation["responses"].values()))["headers"], path
    assert {name: scheme["type"] for name, scheme in found["components"]["securitySchemes"].items()} == {
        "bearer": "http",
        "apiKey": "apiKey",
    }
    assert found["security"] == [{"bearer": []}, {"apiKey": []}]
    unguarded = {path for path, methods in found["paths"].items() if methods.get("get", {}).get("security") == []}
    assert unguarded == {"/livez", "/readyz"}
    listing = found["paths"]["/v1/sessions"]["get"]["parameters"]
    assert {parameter["name"] for parameter in listing} == {"limit", "cursor", "model", "label", "state"}


async def test_replies_are_the_documented_models(running: Running, kind: Kind) -> None:
    """Nothing more and nothing less than the wire models have."""
    session_id = await running.prefilled(kind, 3)
    client, path = running.client, f"/v1/sessions/{session_id}"
    replies: list[tuple[httpx.Response, type[BaseModel]]] = [
        (await client.get(path), schemas.SessionView),
        (await client.get("/v1/sessions"), schemas.SessionPage),
        (await client.post(f"{path}/step", json=kind.json(1, 3)), schemas.AppendReply),
        (await client.post(f"{path}/fork", json={}), schemas.ForkReply),
        (await client.post(f"{path}/truncate", json={"length": 1}), schemas.SessionView),
        (await client.get("/v1/models"), schemas.ModelList),
        (await client.get("/v1/capacity"), schemas.Capacity),
        (await client.delete(path), schemas.Receipt),
    ]
    for reply, model in replies:
        body = reply.json()
        assert set(body) <= set(model.model_fields), model.__name__
        model.model_validate(body)


async def test_concurrent_clients_do_not_disturb_each_other(running: Running) -> None:
    """Many sessions of both kinds at once, each with the result it would have alone."""

    async def life(kind: Kind) -> list[int]:
        path = f"/v1/sessions/{await running.prefilled(kind, 3)}"
        for past in range(3, 9):
            reply = await running.client.post(f"{path}/step", json=kind.json(1, past))
            assert reply.status_code == 200, reply.text
        length: list[int] = (await running.client.get(path)).json()["valid_length"]
        await running.client.delete(path)
        return length

    lives = [life(kind) for kind in KINDS.values() for _ in range(10)]
    assert await asyncio.gather(*lives) == [[9]] * 20
    assert [model.used for model in running.fakes.engine.capacity().models] == [0, 0]
