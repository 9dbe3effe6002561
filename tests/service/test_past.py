"""GET and PUT of a past, for both kinds: what goes out comes in, and every refusal changes nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.types import Message, Receive

from keypast.past import Past
from keypast.schemas import SessionView
from keypast.wire import SAFETENSORS_TYPE, Array, dump_tensors
from service.streams import PIECE, LongBody
from service.worker import ReaderGone
from tests.service.conftest import Running, Start
from tests.service.fakes import KINDS, VOCABULARY, H, Kind
from tests.service.test_refusals import refused

pytestmark = pytest.mark.anyio

DECODER = KINDS["decoder"]
HEADERS = {"content-type": SAFETENSORS_TYPE}
WIDTH = {"letters": 8, "echo": H}


async def get(running: Running, session: str, **headers: str) -> httpx.Response:
    return await running.client.get(f"/v1/sessions/{session}/past", headers=headers)


async def put(running: Running, session: str, body: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
    return await running.client.put(f"/v1/sessions/{session}/past", content=body, headers=HEADERS | headers)


async def exported(running: Running, session: str) -> Past:
    reply = await get(running, session)
    assert reply.status_code == 200, reply.text
    return Past.from_bytes(reply.content)


async def ragged(running: Running, kind: Kind) -> str:
    """Rows of 5 and 2."""
    session = await running.session(kind, batch_size=2)
    body = kind.json(5, rows=2, batch_valid_length=[5, 2])
    assert (await running.client.post(f"/v1/sessions/{session}/prefill", json=body)).status_code == 200
    return session


# ---- out and in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "float32"])
async def test_what_goes_out_comes_in(start: Start, kind: Kind, kv_dtype: str) -> None:
    running = await start(kv_dtype=kv_dtype)
    session, copy = await ragged(running, kind), await running.session(kind, batch_size=2)
    out = await get(running, session)
    assert (out.status_code, out.headers["content-type"], out.headers["etag"]) == (200, SAFETENSORS_TYPE, '"1"')
    assert int(out.headers["content-length"]) == len(out.content)
    past = Past.from_bytes(out.content)
    spec = running.fakes.runner(kind).spec
    assert (past.kind, past.fingerprint, past.valid_length) == (spec.kind, spec.fingerprint, [5, 2])
    width = WIDTH[kind.model]
    assert (past.key().shape, past.value().shape) == ((2, 1, width, 5), (2, 1, 5, width))
    assert past.key().dtype == ("float16" if kv_dtype == "float16" else "float32")
    assert not past.key()[1, :, :, 2:].any()
    assert (past.token_ids is not None) == (kind is DECODER)
    back = await put(running, copy, out.content)
    assert (back.status_code, back.headers["etag"]) == (200, '"1"')
    view = SessionView.model_validate_json(back.content)
    assert (view.id, view.valid_length, view.version, view.blocks) == (copy, [5, 2], 1, 3)
    assert (await get(running, copy)).content == out.content
    replies = [
        await running.client.post(f"/v1/sessions/{name}/step", json=kind.json(1, 5, rows=2)) for name in (session, copy)
    ]
    assert [reply.json()["valid_length"] for reply in replies] == [[6, 3]] * 2
    assert replies[0].json()["outputs"] == replies[1].json()["outputs"]
    assert running.fakes.runner(kind).memory.faults == []


async def test_a_generation_goes_on_from_an_import(running: Running) -> None:
    session, copy = await running.session("letters"), await running.session("letters")
    await running.client.post(f"/v1/sessions/{session}/prefill", json={"text": "abc"})
    await put(running, copy, (await get(running, session)).content)
    reply = await running.client.post(f"/v1/sessions/{copy}/generate", json={"max_tokens": 3})
    assert reply.json()["outputs"]["text"] == ["def"]


async def test_a_past_made_by_hand(running: Running) -> None:
    """As a client would that has keys and values from elsewhere, in a cache of fixed size."""
    key = np.zeros((1, 1, H, 9), np.float16)
    key[..., :3] = [1, 2, 3]
    past = Past({"key_past.0": key, "value_past.0": -key.swapaxes(2, 3)}, [3], "attention", "sha256:1")
    session = await running.session("echo")
    assert (await put(running, session, past.to_bytes())).json()["valid_length"] == [3]
    assert (await exported(running, session)).key()[0, 0, 0].tolist() == [1, 2, 3]


async def test_an_empty_past(running: Running, kind: Kind) -> None:
    out = await get(running, await running.session(kind))
    assert (out.headers["etag"], Past.from_bytes(out.content).valid_length) == ('"0"', [0])
    back = await put(running, await running.session(kind), out.content)
    assert (back.status_code, back.json()["version"], back.json()["valid_length"]) == (200, 1, [0])


async def test_head_answers_as_get(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await ragged(running, kind)}/past"
    head, out = await running.client.head(path), await running.client.get(path)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(out.content)))


async def test_a_long_past_travels_in_pieces(start: Start, kind: Kind) -> None:
    """One row of 100 positions among 1,023 empty ones."""
    running = await start(kv_dtype="float32")
    session, copy = [await running.session(kind, batch_size=1024) for _ in range(2)]
    body = kind.json(80, rows=1024, batch_valid_length=[80] + [0] * 1023)
    if kind is DECODER:
        assert (await running.client.post(f"/v1/sessions/{session}/prefill", json=body)).status_code == 200
    else:
        spec = running.fakes.runner(kind).spec
        arrays: dict[str, Array] = {n: np.zeros(s, d) for n, (d, s) in spec.past_tensors(1024, 80).items()}
        made = Past(arrays, [80] + [0] * 1023, spec.kind, spec.fingerprint)
        assert (await put(running, session, made.to_bytes())).status_code == 200
    out = await get(running, session)
    assert len(out.content) > 2 * PIECE

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(out.content), 100_000):
            yield out.content[at : at + 100_000]

    back = await put(running, copy, chunks())
    assert (back.status_code, back.json()["valid_length"][:2]) == (200, [80, 0])
    assert (await get(running, copy)).content == out.content


async def test_a_reader_who_leaves_a_long_body() -> None:
    class Socket:
        sent = 0

        async def receive(self) -> Message:
            raise AssertionError("there is nothing to read")

        async def send(self, message: Message) -> None:
            self.sent += len(message.get("body", b""))
            if self.sent > PIECE:
                raise OSError("gone")

    socket = Socket()
    receive: Receive = socket.receive
    with pytest.raises(ReaderGone):
        await LongBody([b"head", memoryview(bytes(5 * PIECE))], {}, SAFETENSORS_TYPE)({}, receive, socket.send)
    assert socket.sent == 4 + PIECE


# ---- refusals --------------------------------------------------------------------------------------------------------


async def test_an_import_needs_an_empty_session(running: Running, kind: Kind) -> None:
    session = await ragged(running, kind)
    body = (await get(running, session)).content
    before = running.state()
    refused(await put(running, session, body), 409, "wrong_state")
    assert running.state() == before
    await running.client.post(f"/v1/sessions/{session}/truncate", json={"length": 0})
    assert (await put(running, session, body, **{"if-match": '"2"'})).json()["version"] == 3


async def test_if_match_guards_both(running: Running, kind: Kind) -> None:
    session, copy = await ragged(running, kind), await running.session(kind, batch_size=2)
    assert (await get(running, session, **{"if-match": '"1"'})).status_code == 200
    body = (await get(running, session)).content
    before = running.state()
    for reply, version, lengths in (
        (await get(running, session, **{"if-match": '"0"'}), 1, [5, 2]),
        (await put(running, copy, body, **{"if-match": '"1"'}), 0, [0, 0]),
    ):
        problem = refused(reply, 412, "moved")
        assert (problem.version, problem.valid_length, reply.headers["etag"]) == (version, lengths, f'"{version}"')
    for reply in (
        await get(running, session, **{"if-match": "x"}),
        await put(running, copy, body, **{"if-match": "x"}),
    ):
        refused(reply, 422, "invalid_input", "If-Match")
    assert running.state() == before
    assert (await put(running, copy, body, **{"if-match": '"0"'})).status_code == 200


async def test_unknown_and_gone(running: Running, kind: Kind) -> None:
    body = (await get(running, await ragged(running, kind))).content
    gone = await ragged(running, kind)
    await running.client.delete(f"/v1/sessions/{gone}")
    for reply in (await get(running, "nobody"), await put(running, "nobody", body)):
        refused(reply, 404, "session_not_found")
    for reply in (await get(running, gone), await put(running, gone, body)):
        assert refused(reply, 410, "session_gone").reason == "deleted"


async def test_nothing_of_an_import_into_no_session_is_read(running: Running) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    refused(await put(running, "nobody", never()), 404, "session_not_found")


@pytest.mark.parametrize("media", ["application/json", "text/plain", "application/octet-stream", ""])
async def test_other_media_types_are_415(running: Running, kind: Kind, media: str) -> None:
    session = await running.session(kind)
    before = running.state()
    reply = await put(running, session, b"{}", **{"content-type": media})
    refused(reply, 415, "unsupported_media_type")
    assert running.state() == before


async def test_a_long_body_is_413_declared_or_not(start: Start, kind: Kind) -> None:
    """Its limit is its own."""
    running = await start(settings={"max_past_bytes": 4000, "max_body_bytes": 2000})
    session = await running.session(kind)
    before = running.state()
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1000
            yield b" " * 1000

    for body in (b" " * 4001, endless()):
        reply = await put(running, session, body)
        refused(reply, 413, "body_too_large")
        assert reply.headers["connection"] == "close"
    assert read == 5000, "not read further than the limit"
    refused(await put(running, session, b" " * 4000), 400, "malformed")
    assert running.state() == before


async def test_a_past_that_is_too_long_to_leave(start: Start, kind: Kind) -> None:
    """Two rows padded to 5 positions; the keys and values of 10 positions, and a decoder's ids."""
    limit = 2 * 5 * (2 * WIDTH[kind.model] * 2 + 8 * (kind is DECODER))
    for more, status in ((0, 200), (-1, 422)):
        running = await start(max_past_bytes=limit + more)
        reply = await get(running, await ragged(running, kind))
        assert reply.status_code == status
    refused(reply, 422, "length_exceeded", "past")


MALFORMED = {
    "empty": lambda body: b"",
    "not a file": lambda body: b"hello, this is no safetensors file",
    "cut off": lambda body: body[:-1],
    "more": lambda body: body + b"x",
    "a header beyond the body": lambda body: b"\xff" * 8 + body,
}


@pytest.mark.parametrize("damage", MALFORMED.values(), ids=MALFORMED.keys())
async def test_what_is_no_file_is_400(running: Running, kind: Kind, damage: Callable[[bytes], bytes]) -> None:
    body = (await get(running, await ragged(running, kind))).content
    session = await running.session(kind, batch_size=2)
    before = running.state()
    refused(await put(running, session, damage(body)), 400, "malformed")
    assert running.state() == before


Change = Callable[[dict[str, Any]], object]


def edit(name: str, how: Callable[[Array], Array]) -> Change:
    return lambda file: file.update({name: how(file[name])})


def poke(name: str, value: float) -> Change:
    def change(file: dict[str, Any]) -> None:
        file[name][(0,) * file[name].ndim] = value

    return change


OFF: dict[str, tuple[Change, str]] = {
    "kind": (lambda file: file.update(kind="another"), "kind"),
    "fingerprint": (lambda file: file.update(fingerprint="sha256:9"), "fingerprint"),
    "no keys": (lambda file: file.pop("key_past.0"), "key_past.0"),
    "no values": (lambda file: file.pop("value_past.0"), "value_past.0"),
    "a layer too many": (lambda file: file.update({"key_past.1": file["key_past.0"]}), "key_past.1"),
    "a stranger": (lambda file: file.update(stranger=np.zeros(1, np.float32)), "stranger"),
    "dtype": (edit("key_past.0", lambda array: array.astype(np.float32)), "key_past.0"),
    "heads": (edit("key_past.0", lambda array: array.repeat(2, 1)), "key_past.0"),
    "channels": (edit("value_past.0", lambda array: array[..., 1:]), "value_past.0"),
    "T differs": (edit("value_past.0", lambda array: array[:, :, 1:]), "value_past.0"),
    "rank": (edit("key_past.0", lambda array: array[0]), "key_past.0"),
    "NaN": (poke("key_past.0", np.nan), "key_past.0"),
    "infinite": (poke("value_past.0", np.inf), "value_past.0"),
    "too few rows": (lambda file: file.update(valid_length=[5]), "batch_valid_length"),
    "a length beyond T": (lambda file: file.update(valid_length=[6, 2]), "batch_valid_length"),
    "a negative length": (lambda file: file.update(valid_length=[5, -1]), "batch_valid_length"),
}
OFF_IDS: dict[str, tuple[Change, str]] = {
    "no ids": (lambda file: file.pop("token_ids"), "token_ids"),
    "ids dtype": (edit("token_ids", lambda array: array.astype(np.int32)), "token_ids"),
    "ids of another length": (edit("token_ids", lambda array: array[:, 1:]), "token_ids"),
    "an id beyond the vocabulary": (poke("token_ids", VOCABULARY), "token_ids"),
    "a negative id": (poke("token_ids", -1), "token_ids"),
}


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [(name, *off) for name in KINDS for off in OFF.values()] + [("decoder", *off) for off in OFF_IDS.values()],
    ids=[f"{name}-{off}" for name in KINDS for off in OFF] + list(OFF_IDS),
)
async def test_a_past_that_is_off_is_422_and_names_what_is(
    running: Running, name: str, change: Change, field: str
) -> None:
    kind = KINDS[name]
    past = await exported(running, await ragged(running, kind))
    file: dict[str, Any] = {**past.arrays}
    file |= {"valid_length": past.valid_length, "kind": past.kind, "fingerprint": past.fingerprint}
    change(file)
    lengths, kind_name, fingerprint = (file.pop(key) for key in ("valid_length", "kind", "fingerprint"))
    session = await running.session(kind, batch_size=2)
    before = running.state()
    body = Past(file, lengths, kind_name, fingerprint).to_bytes()
    refused(await put(running, session, body), 422, "invalid_input", field)
    assert running.state() == before


async def test_ids_where_the_model_keeps_none(running: Running) -> None:
    past = await exported(running, await ragged(running, KINDS["attention"]))
    past.arrays["token_ids"] = np.zeros((2, 5), np.int64)
    session = await running.session("echo", batch_size=2)
    refused(await put(running, session, past.to_bytes()), 422, "invalid_input", "token_ids")


@pytest.mark.parametrize("field", ["format", "kind", "fingerprint", "digest"])
async def test_metadata_that_is_off_is_422(running: Running, kind: Kind, field: str) -> None:
    past = await exported(running, await ragged(running, kind))
    tensors = {**past.arrays, "batch_valid_length": np.array([5, 2], np.int32)}
    session = await running.session(kind, batch_size=2)
    metadata = {
        "format": "keypast-past/1",
        "kind": past.kind,
        "fingerprint": past.fingerprint,
        "digest": past.digest,
    }
    before = running.state()
    for other in (None, "sha256:00"):
        changed = {name: text for name, text in (metadata | {field: other}).items() if text is not None}
        refused(await put(running, session, dump_tensors(tensors, changed)), 422, "invalid_input", field)
    assert running.state() == before
    assert (await put(running, session, dump_tensors(tensors, metadata))).status_code == 200


async def test_another_model_s_past_is_422(running: Running) -> None:
    past = (await get(running, await ragged(running, KINDS["attention"]))).content
    session = await running.session("letters", batch_size=2)
    refused(await put(running, session, past), 422, "invalid_input", "kind")


async def test_values_that_a_bfloat16_past_does_not_hold_are_422(start: Start, kind: Kind) -> None:
    running = await start(kv_dtype="bfloat16")
    past = await exported(running, await ragged(running, kind))
    past.key()[0, 0, 0, 0] = 1 + 2**-8  # a bit more than its 7
    session = await running.session(kind, batch_size=2)
    refused(await put(running, session, past.to_bytes()), 422, "invalid_input", "key_past.0")


async def test_longer_than_max_length_has_a_code_of_its_own(running: Running, kind: Kind) -> None:
    body = (await get(running, await ragged(running, kind))).content
    session = await running.session(kind, batch_size=2, max_length=4)
    before = running.state()
    refused(await put(running, session, body), 422, "length_exceeded", "batch_valid_length")
    assert running.state() == before


async def test_a_full_pool_is_429_after_the_wait(start: Start, kind: Kind) -> None:
    running = await start(blocks=6, wait_seconds=0.05)
    body = (await get(running, await ragged(running, kind))).content
    session = await running.session(kind, batch_size=2)
    before = running.state()
    refused(await put(running, session, body), 429, "pool_exhausted")
    assert running.state() == before


async def test_a_failing_device_is_500_and_the_session_as_before(running: Running, kind: Kind) -> None:
    session, empty = await ragged(running, kind), await running.session(kind, batch_size=2)
    body = (await get(running, session)).content
    before = running.state()
    running.fakes.runner(kind).broken = RuntimeError("/secret/path 0x7f")
    for reply in (await get(running, session), await put(running, empty, body)):
        refused(reply, 500, "model_failed")
    assert running.state() == before


async def test_a_session_deleted_meanwhile_is_410(running: Running, kind: Kind) -> None:
    session, empty = await ragged(running, kind), await running.session(kind, batch_size=2)
    body, runner = (await get(running, session)).content, running.fakes.runner(kind)
    for name in (session, empty):
        runner.gate.clear()
        runner.entered.clear()
        transfer = asyncio.create_task(get(running, name) if name == session else put(running, name, body))
        await asyncio.to_thread(runner.entered.wait)
        await running.client.delete(f"/v1/sessions/{name}")
        runner.gate.set()
        refused(await transfer, 410, "session_gone")
    assert {pool.used for pool in running.fakes.engine.capacity().models} == {0}
