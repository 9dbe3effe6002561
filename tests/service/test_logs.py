"""The log: what each line has, and what none of them ever has."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import redirect_stderr
from typing import Any

import pytest

from keypast.keys import new_key
from service import logs
from tests.service.conftest import Running, Start
from tests.service.fakes import KINDS, Kind

pytestmark = pytest.mark.anyio

KEY, RECORD = new_key("alice")
SECRET = "the prompt that nobody else reads"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """All that is logged, as JSON; the loggers are as they were afterwards."""
    names = ("keypast", "uvicorn")
    before = [(list(logging.getLogger(n).handlers), logging.getLogger(n).level) for n in names]
    stream = io.StringIO()
    with redirect_stderr(stream):
        logs.configure("info", "json")
    yield stream
    for name, (handlers, level) in zip(names, before, strict=True):
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = True


def lines(written: io.StringIO, logger: str = "") -> list[dict[str, Any]]:
    told = [json.loads(line) for line in written.getvalue().splitlines()]
    return [line for line in told if logger in ("", line["logger"])]


async def test_a_request_is_one_object(start: Start, written: io.StringIO) -> None:
    running = await start(settings={"keys": RECORD.line()})
    headers = {**AUTHORIZED, "x-request-id": "r-17"}
    reply = await running.client.get("/v1/sessions?label=" + SECRET, headers=headers)
    assert reply.headers["x-request-id"] == "r-17"
    await running.client.get("/v1/sessions")
    good, bad = lines(written, "keypast.access")
    assert good["time"].endswith("+00:00")
    assert isinstance(good["ms"], float)
    wanted = {"level": "info", "method": "GET", "path": "/v1/sessions", "status": 200, "request_id": "r-17"}
    assert {**wanted, "tenant": "alice", "key": RECORD.id}.items() <= good.items()
    assert (bad["status"], "tenant" in bad, "key" in bad) == (401, False, False)
    assert bad["request_id"] not in ("", "r-17")


@pytest.mark.parametrize("given", ["a" * 129, "a b", 'a"', "", "a\tb"])
async def test_a_request_id_that_could_be_anything_is_replaced(running: Running, given: str) -> None:
    reply = await running.client.get("/livez", headers={"x-request-id": given})
    assert reply.headers["x-request-id"] != given
    assert len(reply.headers["x-request-id"]) == 16


async def test_every_change_of_what_there_is_has_its_audit_line(start: Start, written: io.StringIO, kind: Kind) -> None:
    running = await start(settings={"keys": RECORD.line()})
    running.client.headers.update(AUTHORIZED)
    path = f"/v1/sessions/{await running.prefilled(kind, 3, id='one')}"
    await running.client.post("/v1/sessions", json={"model": kind.model, "id": "two"})
    past = await running.client.get(f"{path}/past")
    headers = {"content-type": past.headers["content-type"], "idempotency-key": "k"}
    for _ in range(2):  # the second is a retry, and imports nothing
        reply = await running.client.put("/v1/sessions/two/past", content=past.content, headers=headers)
        assert reply.status_code == 200
    forked = (await running.client.post(f"{path}/fork", json={"count": 2})).json()["sessions"]
    await running.client.delete(path, headers={"x-request-id": "r-1"})
    await running.client.delete(path)
    told = lines(written, "keypast.audit")
    assert [(line["action"], line["session"]) for line in told] == [
        ("create", "one"),
        ("create", "two"),
        ("export", "one"),
        ("import", "two"),
        *[("fork", child["id"]) for child in forked],
        ("delete", "one"),
    ]
    assert {(line["tenant"], line["key"], line["level"]) for line in told} == {("alice", RECORD.id, "info")}
    assert told[-1]["request_id"] == "r-1"
    assert {line["parent"] for line in told if line["action"] == "fork"} == {"one"}


async def test_audit_lines_are_there_when_request_lines_are_not(running: Running, written: io.StringIO) -> None:
    with redirect_stderr(written):
        logs.configure("error", "json")
    await running.session("letters")
    assert [line["logger"] for line in lines(written)] == ["keypast.audit"]


@pytest.mark.parametrize("form", ["json", "text"])
async def test_what_a_request_says_is_never_written(start: Start, written: io.StringIO, form: Any) -> None:
    """The words of an error that nobody foresaw may be the request's own."""
    with redirect_stderr(written):
        logs.configure("debug", form)
    running = await start(settings={"keys": RECORD.line()})
    running.client.headers.update(AUTHORIZED)
    decoder = KINDS["decoder"]
    path = f"/v1/sessions/{await running.prefilled(decoder, 3)}"
    for body in ({"text": SECRET}, {"text": SECRET, SECRET: 1}, {"messages": [{"role": "user", "content": SECRET}]}):
        await running.client.post(f"{path}/prefill", json=body, headers={"idempotency-key": "k" * 9})
    await running.client.post(f"{path}/prefill", content=f'{{"text": "{SECRET}'.encode())
    await running.client.get("/v1/sessions", headers={"authorization": f"Bearer {KEY}x"})
    running.fakes.tokenizer.broken = RuntimeError(f"cannot read {SECRET}")
    reply = await running.client.post(f"{path}/generate", json={"max_tokens": 2, "stop": SECRET})
    assert reply.status_code == 500
    running.fakes.tokenizer.broken = None
    text = written.getvalue()
    assert "builtins.RuntimeError" in text, "what it was and where is told"
    for word in (SECRET, "prompt", KEY, KEY.split("_", 2)[2], RECORD.hashed.hex()):
        assert word not in text


async def test_a_path_cannot_forge_a_line(running: Running, written: io.StringIO) -> None:
    forged = "/nothing%0a%7b%22logger%22:%22keypast.audit%22%7d%1b[2J"
    await running.client.get(forged + "a" * 5000)
    (line,) = lines(written)
    assert len(line["path"]) == logs.LONGEST_PATH
    plain = io.StringIO()
    with redirect_stderr(plain):
        logs.configure("info", "text")
    await running.client.get(forged)
    assert plain.getvalue().count("\n") == 1
    assert "\x1b" not in plain.getvalue()
    assert "/nothing\\n{" in plain.getvalue()


async def test_probes_are_quiet(running: Running, written: io.StringIO) -> None:
    for path in ("/livez", "/readyz"):
        await running.client.get(path)
    assert lines(written) == []


def test_the_engines_own_errors_keep_their_words(written: io.StringIO) -> None:
    try:
        try:
            raise ValueError("the cause")
        except ValueError as cause:
            raise RuntimeError("block 3 is held twice") from cause
    except RuntimeError:
        logging.getLogger(logs.ENGINE).exception("the engine has failed")
    (line,) = lines(written)
    assert line["error"][-1] == "builtins.RuntimeError: block 3 is held twice"
    assert "builtins.ValueError: the cause" in line["error"]
