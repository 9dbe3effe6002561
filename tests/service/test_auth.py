"""Who may what: keys, tenants, roles; and what is said to those who may not."""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import Match

from keypast.keys import KeyRecord, KeysError, new_key, write_keys
from keypast.wire import JSON_TYPE
from service.app import create_app
from service.auth import ANYBODY, LOOK_EVERY, PUBLIC, KeyRing
from service.errors import METHODS, PROBLEM_TYPE, Unauthorized
from service.lifecycle import Loaded
from service.settings import Settings, SettingsError
from tests.service.conftest import Running, Start
from tests.service.fakes import Kind

pytestmark = pytest.mark.anyio

ALICE, ALICE_RECORD = new_key("alice")
BOB, BOB_RECORD = new_key("bob")
ADMIN, ADMIN_RECORD = new_key("ops", "admin")
OVER, OVER_RECORD = new_key("alice", days=-1)
REMOVED, _ = new_key("alice")
LINES = ";".join(record.line() for record in (ALICE_RECORD, BOB_RECORD, ADMIN_RECORD, OVER_RECORD))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def guarded(start: Start) -> Running:
    running: Running = await start(settings={"keys": LINES})
    return running


def routes(running: Running) -> Iterator[tuple[str, str]]:
    """Every path that the application has, the documents' included, and one method of it."""
    scope: dict[str, Any] = {"type": "http", "headers": [], "root_path": "", "path_params": {}}
    paths = set(running.app.openapi()["paths"]) | {"/docs", "/openapi.json", "/docs/oauth2-redirect"}
    for path in sorted(paths):
        plain = path.replace("{session_id}", "a")
        for method in METHODS:
            asked = {**scope, "path": plain, "method": method}
            if any(route.matches(asked)[0] is Match.FULL for route in running.app.router.routes):
                yield method, plain


async def test_every_route_asks_for_a_key(guarded: Running) -> None:
    found = list(routes(guarded))
    assert len(found) > 20
    for method, path in found:
        reply = await guarded.client.request(method, path)
        if path in PUBLIC:
            assert reply.status_code == 200, path
        else:
            media = JSON_TYPE if path.startswith("/v2") else PROBLEM_TYPE
            assert (reply.status_code, reply.headers["content-type"]) == (401, media), path
            assert reply.headers["www-authenticate"] == 'Bearer realm="keypast"'


async def test_what_is_no_route_asks_for_a_key_too(guarded: Running) -> None:
    for path in ("/", "/nothing", "/v1/sessions/", "/livez/", "//livez", "/v1/%2e%2e/livez", "/livez%00"):
        assert (await guarded.client.get(path)).status_code == 401, path
    for method in ("OPTIONS", "TRACE", "HEAD", "BREW"):
        assert (await guarded.client.request(method, "/v1/sessions")).status_code == 401, method


REFUSED: dict[str, list[tuple[str, str]]] = {
    "none": [],
    "an empty one": [("authorization", "Bearer ")],
    "another scheme": [("authorization", f"Basic {ALICE}")],
    "no scheme": [("authorization", ALICE)],
    "forged": [("authorization", f"Bearer {ALICE[:-2]}xx")],
    "over": [("authorization", f"Bearer {OVER}")],
    "removed": [("authorization", f"Bearer {REMOVED}")],
    "its id alone": [("x-api-key", ALICE_RECORD.id)],
    "its hash": [("x-api-key", ALICE_RECORD.hashed.hex())],
    "two that differ": [("authorization", f"Bearer {ALICE}"), ("x-api-key", BOB)],
    "one twice in a header": [("x-api-key", f"{ALICE}, {ALICE}")],
    "a good and a bad scheme": [("authorization", f"Bearer {ALICE}"), ("authorization", "Basic x")],
    "bytes": [("x-api-key", "\xff\xfe")],
}


@pytest.mark.parametrize("headers", REFUSED.values(), ids=REFUSED.keys())
async def test_every_key_that_does_not_open_is_told_the_same(guarded: Running, headers: list[tuple[str, str]]) -> None:
    sent = [(name.encode(), value.encode("latin-1")) for name, value in [*headers, ("x-request-id", "r-1")]]
    reply = await guarded.client.get("/v1/sessions", headers=httpx.Headers(sent))
    plain = await guarded.client.get("/v1/sessions", headers={"x-request-id": "r-1"})
    assert reply.status_code == 401
    assert (reply.content, reply.headers) == (plain.content, plain.headers)


@pytest.mark.parametrize(
    "headers",
    [
        bearer(ALICE),
        {"authorization": f"bearer  {ALICE}"},
        {"x-api-key": ALICE},
        {"x-api-key": ALICE, "authorization": f"Bearer {ALICE}"},
    ],
)
async def test_both_headers_open(guarded: Running, headers: dict[str, str]) -> None:
    reply = await guarded.client.get("/v1/sessions", headers=headers)
    assert (reply.status_code, reply.json()["data"]) == (200, [])


async def test_a_refused_request_is_not_read(guarded: Running) -> None:
    def body() -> Iterator[bytes]:
        raise AssertionError("nobody asked for it")
        yield b""

    async def pieces() -> Any:
        for piece in body():
            yield piece

    reply = await guarded.client.post("/v1/sessions", content=pieces())
    assert reply.status_code == 401


def asked_of_a_session(kind: Kind) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, the path after the session's, and what is sent."""
    binary = kind.binary(3)
    return [
        ("GET", "", {}),
        ("DELETE", "", {}),
        ("PATCH", "", {"json": {"pinned": True}}),
        ("POST", "/prefill", {"json": kind.json(3)}),
        ("POST", "/step", {"json": kind.json(1)}),
        ("POST", "/score", {"json": kind.json(1)}),
        ("POST", "/generate", {"json": {}}),
        ("POST", "/fork", {"json": {}}),
        ("POST", "/truncate", {"json": {"length": 0}}),
        ("GET", "/past", {}),
        ("PUT", "/past", {"content": binary["content"], "headers": binary["headers"]}),
    ]


async def test_another_tenants_session_is_as_one_that_never_was(guarded: Running, kind: Kind) -> None:
    created = await guarded.client.post("/v1/sessions", json={"model": kind.model, "id": "mine"}, headers=bearer(ALICE))
    assert created.status_code == 201
    asked = asked_of_a_session(kind)
    assert {path for _, path in routes(guarded) if "/sessions/a" in path} == {f"/v1/sessions/a{v}" for _, v, _ in asked}
    for method, verb, arguments in asked:
        headers = {**arguments.pop("headers", {}), **bearer(BOB), "x-request-id": "r-1", "if-match": '"0"'}
        theirs, never = [
            await guarded.client.request(method, f"/v1/sessions/{name}{verb}", headers=headers, **arguments)
            for name in ("mine", "ours")
        ]
        assert theirs.status_code == 404
        assert theirs.content.replace(b"mine", b"ours") == never.content, verb
        assert theirs.headers == never.headers
    step = {"items": [{"session_id": name, **kind.json(1)} for name in ("mine", "ours")]}
    if kind.model == "letters":
        items = (await guarded.client.post("/v1/batch/step", json=step, headers=bearer(BOB))).json()["items"]
        assert [item["status"] for item in items] == [404, 404]
    assert (await guarded.client.get("/v1/sessions", headers=bearer(BOB))).json()["data"] == []
    again = await guarded.client.post("/v1/sessions", json={"model": kind.model, "id": "mine"}, headers=bearer(BOB))
    assert again.status_code == 201, "its id is free in every other tenant"
    mine = await guarded.client.get("/v1/sessions/mine", headers=bearer(ALICE))
    assert (mine.json()["version"], mine.json()["pinned"]) == (0, False)


def lines_run(root: Path, lines: list[tuple[str, int]]) -> Callable[..., Any]:
    """For sys.settrace: each line of the product that runs, in order."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        at = Path(frame.f_code.co_filename)
        if not any(at.is_relative_to(root / room) for room in ("service", "engine", "keypast")):
            return None
        if event == "line":
            lines.append((at.name, frame.f_lineno))
        return trace

    return trace


async def test_another_tenants_session_costs_what_one_costs_that_never_was(guarded: Running, kind: Kind) -> None:
    """The time of an answer tells nothing: line by line the same is done for both."""
    created = await guarded.client.post("/v1/sessions", json={"model": kind.model, "id": "mine"}, headers=bearer(ALICE))
    assert created.status_code == 201
    for method, verb, arguments in asked_of_a_session(kind):
        headers = {**arguments.pop("headers", {}), **bearer(BOB), "x-request-id": "r-1"}
        runs: list[list[tuple[str, int]]] = []
        for name in ("ours", "mine", "ours"):  # the first time something may be put by
            runs.append([])
            before = sys.gettrace()
            sys.settrace(lines_run(Path(__file__).parents[2], runs[-1]))
            try:
                reply = await guarded.client.request(method, f"/v1/sessions/{name}{verb}", headers=headers, **arguments)
            finally:
                sys.settrace(before)
            assert reply.status_code == 404
        assert runs[1] == runs[2], verb
        assert len(runs[1]) > 50


async def test_admins_routes_are_for_admins(guarded: Running) -> None:
    admins = [(method, path) for method, path in routes(guarded) if path.startswith("/v1/admin")]
    assert admins == [("GET", "/v1/admin/check"), ("POST", "/v1/admin/drain"), ("GET", "/v1/admin/sessions")]
    for method, path in admins:
        reply = await guarded.client.request(method, path, headers=bearer(ALICE))
        assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
    assert guarded.service.status == "ready"


async def test_without_keys_nobody_is_an_admin(running: Running) -> None:
    for headers in ({}, bearer("whatever")):
        assert (await running.client.get("/v1/sessions", headers=headers)).status_code == 200
        assert (await running.client.get("/v1/admin/sessions", headers=headers)).status_code == 403


async def test_an_admin_sees_everybodys_sessions_in_order(guarded: Running) -> None:
    for at in range(5):
        headers = bearer((ALICE, BOB)[at % 2])
        await guarded.client.post("/v1/sessions", json={"model": "letters", "id": f"s{at}"}, headers=headers)
    seen: list[tuple[str, str]] = []
    cursor: dict[str, str] = {}
    while True:
        reply = await guarded.client.get("/v1/admin/sessions", params={"limit": "2", **cursor}, headers=bearer(ADMIN))
        page = reply.json()
        seen += [(view["id"], view["tenant"]) for view in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == [(f"s{at}", ("alice", "bob")[at % 2]) for at in range(5)]
    own = await guarded.client.get("/v1/sessions", headers=bearer(ADMIN))
    assert own.json()["data"] == [], "an admin's own sessions are its tenant's"


async def test_an_admin_counts_the_books_anew_and_drains(guarded: Running) -> None:
    reply = await guarded.client.get("/v1/admin/check", headers=bearer(ADMIN))
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
    reply = await guarded.client.post("/v1/admin/drain", headers=bearer(ADMIN))
    assert (reply.status_code, reply.json()["status"]) == (202, "draining")
    refused = await guarded.client.post("/v1/sessions", json={"model": "letters"}, headers=bearer(ALICE))
    assert refused.status_code == 503
    assert (await guarded.client.get("/readyz")).status_code == 503


async def test_who_has_no_key_is_not_told_why_it_is_not_ready() -> None:
    def load(progress: Callable[[str], None]) -> Loaded:
        progress("reading /srv/models/secret")
        raise RuntimeError("no")

    app = create_app(load, Settings(keys=LINES))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://k") as client:
        with pytest.raises(RuntimeError, match="no"):
            await app.state.service.loaded()
        told = await client.get("/readyz")
        assert (told.status_code, told.json()) == (503, {"status": "down"})
        assert "detail" in (await client.get("/health", headers=bearer(ALICE))).json()


async def test_a_route_that_forgets_to_ask_is_guarded_all_the_same(guarded: Running) -> None:
    async def forgetful() -> dict[str, int]:
        return {"secret": 1}

    guarded.app.router.routes.append(APIRoute("/v1/forgetful", forgetful))
    assert (await guarded.client.get("/v1/forgetful")).status_code == 401
    assert (await guarded.client.get("/v1/forgetful", headers=bearer(ALICE))).json() == {"secret": 1}


async def test_no_origin_is_let_in(guarded: Running) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for method in ("OPTIONS", "GET"):
        reply = await guarded.client.request(method, "/v1/sessions", headers={**headers, **bearer(ALICE)})
        assert not [name for name in reply.headers if name.startswith("access-control")]


async def test_a_websocket_is_closed(guarded: Running) -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    await guarded.app({"type": "websocket", "path": "/v1/sessions", "headers": [], "state": {}}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---- the ring --------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def opens(ring: KeyRing, key: str) -> bool:
    try:
        return bool(ring.caller(Headers(bearer(key))).key_id)
    except Unauthorized:
        return False


def changed(file: Path, *records: KeyRecord) -> None:
    write_keys(file, records)


def test_the_file_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, timer = tmp_path / "keys", Clock()
    changed(file, ALICE_RECORD)
    ring = KeyRing(file=file, timer=timer)
    assert (opens(ring, ALICE), opens(ring, BOB)) == (True, False)
    changed(file, ALICE_RECORD, BOB_RECORD)
    assert not opens(ring, BOB), "it is not looked at with every request"
    timer.now += LOOK_EVERY
    assert (opens(ring, ALICE), opens(ring, BOB)) == (True, True)
    changed(file, BOB_RECORD)
    timer.now += LOOK_EVERY
    assert (opens(ring, ALICE), opens(ring, BOB)) == (False, True)
    file.write_text("nonsense " + ALICE)
    timer.now += LOOK_EVERY
    with caplog.at_level(logging.ERROR):
        assert opens(ring, BOB), "what cannot be read changes nothing"
    assert ALICE not in caplog.text
    file.unlink()
    timer.now += LOOK_EVERY
    assert not opens(ring, BOB), "what is gone opens nothing"
    changed(file, ALICE_RECORD)
    timer.now += LOOK_EVERY
    assert opens(ring, ALICE)


def test_a_key_ends_on_time_without_a_look_at_the_file() -> None:
    clock = Clock(time.time())
    key, record = new_key("alice", days=1)
    ring = KeyRing(record.line(), clock=clock)
    assert opens(ring, key)
    clock.now += 86_401
    assert not opens(ring, key)


def test_keys_of_the_environment_and_the_file_are_there_together(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    changed(file, BOB_RECORD)
    ring = KeyRing(ALICE_RECORD.line(), file)
    assert (opens(ring, ALICE), opens(ring, BOB)) == (True, True)


def test_no_keys_are_everybody_and_an_empty_file_is_nobody(tmp_path: Path) -> None:
    assert KeyRing().caller(Headers(bearer("x"))) == ANYBODY
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    ring = KeyRing(file=file)
    assert not opens(ring, ALICE)
    with pytest.raises(Unauthorized):
        ring.caller(Headers({}))


@pytest.mark.parametrize("what", ["missing", "nonsense", "a directory"])
def test_keys_that_cannot_be_read_do_not_start(tmp_path: Path, what: str) -> None:
    file = tmp_path / "keys"
    if what == "nonsense":
        file.write_bytes(os.urandom(64) + b"\xff")
    elif what == "a directory":
        file.mkdir()
    with pytest.raises(KeysError) as refused:
        KeyRing(file=file)
    assert str(file) in str(refused.value)


async def test_a_wrong_setting_says_which(start: Start) -> None:
    with pytest.raises(SettingsError, match="KEYPAST_KEYS: line 1"):
        await start(settings={"keys": "nonsense"})
    with pytest.raises(SettingsError, match="KEYPAST_KEYS_FILE: "):
        await start(settings={"keys_file": "/nowhere/keys"})


def test_settings_do_not_show_the_keys() -> None:
    assert ALICE_RECORD.hashed.hex() not in repr(Settings(keys=ALICE_RECORD.line()))


def test_the_comparison_looks_at_every_byte() -> None:
    """A hash that begins as the right one does is as wrong as any: what is compared is whole digests."""
    secret = ALICE.split("_", 2)[2]
    hashed = hashlib.blake2b(secret.encode(), key=ALICE_RECORD.salt, digest_size=32).digest()
    assert hashed == ALICE_RECORD.hashed
    for at in range(32):
        wrong = bytes(byte ^ (1 << 3 if i == at else 0) for i, byte in enumerate(hashed))
        record = KeyRecord(ALICE_RECORD.id, "alice", "user", None, ALICE_RECORD.salt, wrong)
        assert not record.is_of(secret)


async def test_a_tenants_requests_a_minute(start: Start) -> None:
    running = await start(settings={"keys": LINES, "requests_per_minute": 5})
    for _ in range(5):
        assert (await running.client.get("/v1/sessions", headers=bearer(ALICE))).status_code == 200
    reply = await running.client.get("/v1/sessions", headers=bearer(ALICE))
    assert (reply.status_code, reply.json()["code"]) == (429, "quota_exceeded")
    assert 1 <= int(reply.headers["retry-after"]) <= 12
    assert (await running.client.get("/v1/sessions", headers=bearer(BOB))).status_code == 200
    assert (await running.client.get("/livez")).status_code == 200
