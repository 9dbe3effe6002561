"""How a body comes in: how long it may take, in how many pieces, packed how; and what it costs to refuse it."""

import asyncio
import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from engine.errors import QuotaExceeded
from engine.turns import GUARDED
from keypast.keys import new_key
from keypast.schemas import CreateSession, GenerateRequest, PrefillRequest, Request
from keypast.wire import MAX_ERRORS, MAX_NAMES, MalformedError, WireError, validated
from service.bodies import AT_ONCE, FEW, FINE, UNCOUNTED, Pieces, Room, Unpacked
from service.errors import BodiesFull, BodyTooFine, BodyTooSlow
from service.limits import RequestRate, Turnstile
from tests.service.conftest import Running, Start, until
from tests.service.fakes import KINDS, Kind
from tests.service.raw_client import RawRequest

pytestmark = pytest.mark.anyio

DECODER = KINDS["decoder"]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
}


async def pieces_of(body: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(body), size):
        yield body[at : at + size]


@pytest.mark.parametrize("coding", PACKERS)
@pytest.mark.parametrize("size", [1 << 20, 100])
async def test_a_packed_body_is_as_the_plain_one(running: Running, kind: Kind, coding: str, size: int) -> None:
    path = f"/v1/sessions/{await running.session(kind)}/prefill"
    packed = PACKERS[coding](json.dumps(kind.json(3)).encode())
    reply = await running.client.post(path, content=pieces_of(packed, size), headers={"content-encoding": coding})
    assert (reply.status_code, reply.json()["valid_length"]) == (200, [3])
    binary = kind.binary(3, 3)
    packed, headers = PACKERS[coding](binary["content"]), {**binary["headers"], "content-encoding": coding}
    reply = await running.client.post(path, content=packed, headers=headers, params=binary["params"])
    assert (reply.status_code, reply.headers["keypast-valid-length"]) == (200, "6")


async def test_a_retry_that_is_packed_otherwise_is_the_same_request(running: Running) -> None:
    path, body = f"/v1/sessions/{await running.session('letters')}/prefill", json.dumps(DECODER.json(3)).encode()
    for coding, pack in {"identity": bytes, **PACKERS}.items():
        headers = {"content-encoding": coding, "idempotency-key": "k"}
        reply = await running.client.post(path, content=pack(body), headers=headers)
        assert (reply.status_code, reply.json()["valid_length"]) == (200, [3])


WHOLE = gzip.compress(b'{"token_ids": [[97]]}')
BADLY_PACKED: dict[str, tuple[bytes, str, int]] = {
    "plain": (b'{"token_ids": [[97]]}', "gzip", 400),
    "cut off": (WHOLE[:-9], "gzip", 400),
    "empty": (b"", "gzip", 400),
    "goes on": (WHOLE + b"x", "gzip", 400),
    "two members": (WHOLE + WHOLE, "gzip", 400),
    "a wrong checksum": (WHOLE[:-8] + bytes(8), "gzip", 400),
    "the other one": (WHOLE, "deflate", 400),
    "unknown": (WHOLE, "br", 415),
    "twice": (gzip.compress(WHOLE), "gzip, gzip", 415),
}


@pytest.mark.parametrize(("body", "coding", "status"), BADLY_PACKED.values(), ids=BADLY_PACKED.keys())
async def test_a_badly_packed_body_is_refused(running: Running, body: bytes, coding: str, status: int) -> None:
    session = await running.session("letters")
    before = running.state()
    headers = {"content-encoding": coding}
    reply = await running.client.post(f"/v1/sessions/{session}/prefill", content=body, headers=headers)
    assert reply.status_code == status, reply.text
    assert running.state() == before


async def test_a_bomb_is_unpacked_no_further_than_the_limit(start: Start) -> None:
    running = await start(settings={"max_json_bytes": 1 << 20})
    path = f"/v1/sessions/{await running.session('letters')}/prefill"
    bombs = [PACKERS[coding](b" " * (200 << 20)) for coding in ("gzip", "deflate")]
    tracemalloc.start()
    for coding, bomb in zip(("gzip", "deflate"), bombs, strict=True):
        reply = await running.client.post(path, content=bomb, headers={"content-encoding": coding})
        assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert (await running.client.post(path, json=DECODER.json(3))).status_code == 200


class Script:
    """A receive that gives these pieces, then waits for ever."""

    def __init__(self, pieces: list[bytes], *, whole: bool) -> None:
        self._messages: list[Message] = [
            {"type": "http.request", "body": piece, "more_body": not whole or at < len(pieces) - 1}
            for at, piece in enumerate(pieces)
        ]

    async def __call__(self) -> Message:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)


async def drained(body: Pieces | Unpacked) -> bytes:
    whole = bytearray()
    while True:
        message = await body.receive()
        whole += message["body"]
        if not message["more_body"]:
            return bytes(whole)


@pytest.mark.parametrize("sent", [[], [b"a"], [b"a"] * 100])
async def test_a_body_that_does_not_come_is_given_up(sent: list[bytes]) -> None:
    with pytest.raises(BodyTooSlow, match=f"only {len(sent)} bytes"):
        await drained(Pieces(Script(sent, whole=False), 0.02))


async def test_a_slow_body_is_408_and_its_session_as_before(start: Start) -> None:
    running = await start(settings={"body_seconds": 0.05})
    path = f"/v1/sessions/{await running.session('letters')}/prefill"
    before = running.state()

    async def slow() -> AsyncIterator[bytes]:
        for byte in b'{"token_ids": [[97, 97, 97, 97, 97]]}':
            yield bytes([byte])
            await asyncio.sleep(0.01)

    reply = await running.client.post(path, content=slow())
    assert (reply.status_code, reply.json()["code"], reply.headers["connection"]) == (408, "too_slow", "close")
    assert running.state() == before
    assert (await running.client.post(path, json=DECODER.json(3))).status_code == 200


async def test_after_the_body_nothing_is_timed(start: Start) -> None:
    """What waits for its turn, or streams, takes as long as it takes."""
    running = await start(settings={"body_seconds": 0.05})
    running.fakes.decoder.gate.clear()
    path = f"/v1/sessions/{await running.session('letters')}/prefill"
    request = RawRequest(running.app, path, DECODER.json(3))
    await asyncio.sleep(0.3)
    running.fakes.decoder.gate.set()
    await request.task
    assert request.status == 200


async def test_many_small_pieces_are_refused_soon_and_few_are_not() -> None:
    with pytest.raises(BodyTooFine, match="6 bytes on the average"):
        await drained(Pieces(Script([b"abcdef"] * 500_000, whole=True), 30))
    assert await drained(Pieces(Script([b"abcdef"] * FEW, whole=True), 30)) == b"abcdef" * FEW
    assert await drained(Pieces(Script([b"a" * FINE] * 5000, whole=True), 30)) == b"a" * FINE * 5000


@pytest.mark.parametrize("size", [0, 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE])
@pytest.mark.parametrize("coding", PACKERS)
async def test_unpacked_is_what_was_packed_at_every_size(size: int, coding: str) -> None:
    body = bytes(at * 7 % 251 for at in range(size))
    packed = PACKERS[coding](body)
    for cut in (len(packed), 1000):
        parts = [packed[at : at + cut] for at in range(0, len(packed), cut)]
        assert await drained(Unpacked(Script([*parts, b""], whole=True), coding)) == body
    with pytest.raises(MalformedError):
        await drained(Unpacked(Script([packed[:-1]], whole=True), coding))


# ---- all of them together ------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 40)), max_size=30))
def test_room_is_shared_and_never_exceeded(asked: list[tuple[str, int]]) -> None:
    """Against lists: a negative size gives back the tenant's oldest body."""
    room, held = Room(100), {name: list[int]() for name in "abc"}
    for tenant, size in asked:
        own, everything = sum(held[tenant]), sum(map(sum, held.values()))
        if size < 0:
            if held[tenant]:
                room.give(tenant, held[tenant].pop(0))
        elif own + size <= 100 - (everything + size):
            room.take(tenant, size)
            held[tenant].append(size)
        else:
            with pytest.raises(BodiesFull):
                room.take(tenant, size)
    for tenant, sizes in held.items():
        for size in sizes:
            room.give(tenant, size)
    room.take("a", 50)


async def test_more_bodies_than_there_is_room_for_are_503_until_some_are_done(start: Start) -> None:
    sizes = {"max_body_bytes": 200_000, "max_past_bytes": 200_000, "bodies_bytes": 400_000}
    running = await start(settings=sizes)
    paths = [f"/v1/sessions/{await running.session('letters')}/prefill" for _ in range(2)]
    long = json.dumps(DECODER.json(3)).encode() + b" " * (UNCOUNTED + 120_000)
    running.fakes.decoder.gate.clear()
    held = asyncio.create_task(running.client.post(paths[0], content=long))
    await until(running.fakes.decoder.entered.is_set)
    before = running.state()
    for body, headers in ((long, {}), (gzip.compress(long), {"content-encoding": "gzip"})):
        refused = await running.client.post(paths[1], content=body, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (503, "bodies_full")
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    assert running.state() == before
    assert (await running.client.post("/v1/sessions", json={"model": "letters"})).status_code == 201
    running.fakes.decoder.gate.set()
    assert (await held).status_code == 200
    assert (await running.client.post(paths[1], content=long)).status_code == 200


# ---- JSON ------------------------------------------------------------------------------------------------------------

MILLION = 1_000_000
HEAVY: dict[str, tuple[type[Request], bytes]] = {
    "names": (PrefillRequest, b"{%s}" % b",".join(b'"%d":1' % at for at in range(MILLION))),
    "the same name": (PrefillRequest, b"{%s}" % b",".join([b'"text":1'] * MILLION)),
    "labels": (CreateSession, b'{"model":"a","labels":{%s}}' % b",".join(b'"%d":"1"' % at for at in range(MILLION))),
    "wrong ids": (PrefillRequest, b'{"token_ids":[[%s]]}' % b",".join([b'"a"'] * MILLION)),
    "empty rows": (PrefillRequest, b'{"token_ids":[%s]}' % b",".join([b"[]"] * MILLION)),
    "messages": (PrefillRequest, b'{"messages":[%s]}' % b",".join([b"{}"] * MILLION)),
    "texts": (PrefillRequest, b'{"text":[%s]}' % b",".join([b"1"] * MILLION)),
    "stops": (GenerateRequest, b'{"stop":[%s]}' % b",".join([b'"a"'] * MILLION)),
}


@pytest.mark.parametrize(("model", "body"), HEAVY.values(), ids=HEAVY.keys())
def test_what_is_wrong_a_million_times_is_told_once(model: type[Request], body: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(WireError) as refused:
        validated(model, body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(refused.value)) < 200
    assert peak < 32 << 20


def test_names_are_counted_and_what_looks_like_them_is_not() -> None:
    text = '"a":' * (MAX_NAMES + 1)
    assert validated(PrefillRequest, json.dumps({"text": text}).encode()).text == text
    many = {str(at): 1 for at in range(MAX_NAMES + 1)}
    for body in (
        json.dumps(many),
        json.dumps(many, indent=1),
        '{"a":"\\' + json.dumps(many),
        '{"x":"' + '\\":' * 99_999,
    ):
        with pytest.raises(MalformedError):
            validated(PrefillRequest, body.encode())


def test_more_errors_than_anybody_reads_are_counted() -> None:
    body = json.dumps({str(at): 1 for at in range(MAX_ERRORS + 1)}).encode()
    with pytest.raises(WireError, match=f"{MAX_ERRORS + 1} things"):
        validated(PrefillRequest, body)


TOO_MUCH: dict[str, tuple[str, dict[str, object], str]] = {
    "stop texts": ("/generate", {"stop": ["a"] * 17}, "stop"),
    "a long stop text": ("/generate", {"stop": "a" * 1025}, "stop"),
    "logprobs": ("/prefill", {"token_ids": [[1]], "top_logprobs": 257}, "top_logprobs"),
    "forks": ("/fork", {"count": 257}, "count"),
    "messages": ("/prefill", {"messages": [{"role": "user", "content": "a"}] * 4097}, "messages"),
    "texts": ("/prefill", {"text": ["a"] * 1025}, "text"),
    "rows": ("/prefill", {"token_ids": [[1]] * 1025}, "token_ids"),
}


@pytest.mark.parametrize(("verb", "body", "field"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
async def test_too_much_of_it_is_422(running: Running, verb: str, body: dict[str, object], field: str) -> None:
    path = f"/v1/sessions/{await running.prefilled(DECODER, 3)}{verb}"
    before = running.state()
    reply = await running.client.post(path, json=body)
    assert (reply.status_code, reply.json()["field"].partition("[")[0]) == (422, field), reply.text
    assert running.state() == before


async def test_json_is_shorter_than_tensors_may_be(start: Start) -> None:
    running = await start(settings={"max_json_bytes": 2000})
    path = f"/v1/sessions/{await running.session('letters')}/prefill"
    reply = await running.client.post(path, content=b" " * 2001)
    assert reply.status_code == 413
    binary = DECODER.binary(3)
    reply = await running.client.post(path, content=b" " * 2001, headers=binary["headers"])
    assert reply.status_code == 400


# ---- the rate --------------------------------------------------------------------------------------------------------


def test_a_rate_lets_a_minutes_worth_in_at_once_and_then_one_at_a_time() -> None:
    now = 0.0
    rate = RequestRate(60, lambda: now)
    for _ in range(60):
        rate.take("a")
    with pytest.raises(QuotaExceeded) as refused:
        rate.take("a")
    assert refused.value.retry_after == pytest.approx(1)
    rate.take("b")
    now += refused.value.retry_after
    rate.take("a")
    with pytest.raises(QuotaExceeded):
        rate.take("a")
    now += 60
    for _ in range(60):
        rate.take("a")
    with pytest.raises(QuotaExceeded):
        rate.take("a")


def test_no_rate_refuses_nobody() -> None:
    rate = RequestRate(0, lambda: 0.0)
    for _ in range(10_000):
        rate.take("a")


# ---- who waits for whom ----------------------------------------------------------------------------------------------


def test_others_come_in_one_after_the_other_while_a_guaranteed_tenant_is_at_work() -> None:
    now = 10.0
    turnstile = Turnstile(["gold"], 100, lambda: now)
    assert [turnstile.wait_seconds("a"), turnstile.wait_seconds("b")] == [0, 0]
    assert turnstile.wait_seconds("gold") == 0
    waits = [turnstile.wait_seconds(tenant) for tenant in ("a", "a", "gold", "b", "a")]
    assert waits == pytest.approx([0, 0.01, 0, 0.02, 0.03])
    now += 0.035  # all of them are in, and the next would be at 0.04
    assert turnstile.wait_seconds("b") == pytest.approx(0.005)
    now += GUARDED + 0.001
    assert [turnstile.wait_seconds("a"), turnstile.wait_seconds("a")] == [0, 0]


def test_without_a_guarantee_or_a_bound_nobody_waits() -> None:
    for turnstile in (Turnstile([], 100, lambda: 0.0), Turnstile(["gold"], 0, lambda: 0.0)):
        assert {turnstile.wait_seconds(tenant) for tenant in ("gold", "a", "a", "a")} == {0}


async def test_a_flood_waits_and_who_watches_or_is_guaranteed_does_not(start: Start) -> None:
    gold, gold_record = new_key("gold")
    flood, flood_record = new_key("flood")
    settings: dict[str, object] = {
        "keys": f"{gold_record.line()};{flood_record.line()}",
        "quotas": {"gold": {"guaranteed_blocks": 4}},
        "guard_requests": 2,  # the second of others waits for half a second
    }
    running: Running = await start(settings=settings)

    async def ask(key: str, path: str = "/v1/sessions") -> float:
        began = time.perf_counter()
        reply = await running.client.get(path, headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == 200
        return time.perf_counter() - began

    await ask(gold)
    own, *others, watching = await asyncio.gather(ask(gold), ask(flood), ask(flood), ask(flood, "/readyz"))
    assert max(others) >= 0.45
    assert max(own, watching) < max(others)
