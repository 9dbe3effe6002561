"""What nobody who means well would send, over a real socket. Each attack has a clear refusal; the service's memory
stays where it was, its session as it was, and it answers the next request.

A new route needs new lines in the tables: a raw request and what it is answered with.
"""

import base64
import gzip
import json
import pickle
import re
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from keypast.keys import new_key, read_keys, write_keys
from keypast.wire import SAFETENSORS_TYPE
from tests.e2e.test_server import Server, until
from tests.service.fakes import KINDS

KEY, USER = new_key("alice")
ADMIN_KEY, ADMIN = new_key("ops", "admin")
OVER_KEY, OVER = new_key("alice", days=-1)
GROWTH = 64  # MiB that an attack may take while it lasts
PARSED = 40  # times its size that JSON of nothing but short values takes when it is parsed
LEAKS = re.compile(r"Traceback|/work|/usr|/home|0x[0-9a-f]{6}|site-packages|\.py\b|pydantic|<class|object at 0x")
JSON = "application/json"


@dataclass(frozen=True)
class Target:
    """A running service, and the paths of sessions in it, three positions long each."""

    server: Server
    client: httpx.Client
    decoder: str
    attention: str

    @property
    def address(self) -> tuple[str, int]:
        return self.client.base_url.host, self.client.base_url.port or 80

    def memory(self, name: str) -> int:
        """MiB of `VmRSS`, or of its peak `VmHWM`."""
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) >> 10

    def forget_peak(self) -> None:
        Path(f"/proc/{self.server.process.pid}/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    settings = {
        "keys": ";".join(record.line() for record in (USER, ADMIN, OVER)),
        "max_json_bytes": str(4 << 20),
        "max_body_bytes": str(8 << 20),
        "max_past_bytes": str(8 << 20),
        "bodies_bytes": str(32 << 20),
        "body_seconds": "1",
        "head_seconds": "1",
        "stall_seconds": "0.5",
    }
    with Server("tests.e2e.quick_service", **settings) as server:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.address(), headers=headers, timeout=30) as client:
            paths = []
            for kind in (KINDS["decoder"], KINDS["attention"]):
                path = client.post("/v1/sessions", json={"model": kind.model}).headers["location"]
                assert client.post(f"{path}/prefill", json=kind.json(3)).status_code == 200
                paths.append(path)
            yield Target(server, client, *paths)


def exchange(address: tuple[str, int], parts: Iterable[bytes], seconds: float = 20) -> tuple[int, str, bytes]:
    """Status, media type and body of the reply to the parts, which are sent whether or not it has come."""
    with socket.create_connection(address, seconds) as connection:

        def send() -> None:
            with suppress(OSError):
                for part in parts:
                    connection.sendall(part)

        sender = threading.Thread(target=send)
        sender.start()
        reply = b""
        length = None
        try:
            while length is None or len(reply) < length:
                more = connection.recv(1 << 16)
                if not more:
                    break
                reply += more
                head, end, _ = reply.partition(b"\r\n\r\n")
                if end and length is None:
                    length = len(head) + 4 + int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
        finally:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            sender.join(10)
    head, _, body = reply.partition(b"\r\n\r\n")
    media = re.findall(rb"(?i)content-type: (\S+)", head)
    return int(head.split()[1]), media[0].decode(), body


def is_held(connection: socket.socket) -> bool:
    """Whether the other side is still some process's; what is on the way from one that let go has none."""
    port = connection.getsockname()[1]
    entries = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(int(entry[2].rpartition(":")[2], 16) == port and entry[9] != "0" for entry in entries)


def head(method: str, path: str, *headers: str, key: str | None = KEY) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: k", *headers]
    if key is not None:
        lines.append(f"authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode()


def request(path: str, body: bytes, media: str = JSON, *headers: str, method: str = "POST") -> list[bytes]:
    length = f"content-length: {len(body)}"
    return [head(method, path, f"content-type: {media}", length, *headers), body]


def chunked(path: str, chunks: Iterable[bytes], media: str = JSON) -> Iterator[bytes]:
    """The chunks as they are, their sizes and line ends included."""
    yield head("POST", path, f"content-type: {media}", "transfer-encoding: chunked")
    yield from chunks


def trickle(first: bytes, byte: bytes, seconds: float = 4.0) -> Iterator[bytes]:
    yield first
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield byte
        time.sleep(0.05)


# ---- the wire --------------------------------------------------------------------------------------------------------

Raw = Callable[[Target], Iterable[bytes]]

WIRE: dict[str, tuple[Raw, int, str]] = {
    "3 MB in chunks of 6 bytes": (
        lambda t: chunked(t.decoder + "/prefill", [b"6\r\n      \r\n" * 5000] * 100),
        400,
        "body_too_fine",
    ),
    "chunks of a byte, one a packet": (
        lambda t: chunked(t.decoder + "/prefill", [b"1\r\n \r\n"] * 100_000),
        400,
        "body_too_fine",
    ),
    "chunk extensions": (
        lambda t: chunked(t.decoder + "/prefill", [b"1;" + b"a" * 60_000 + b"\r\n \r\n"] * 50),
        400,
        "body_too_fine",
    ),
    "a chunk extension without end": (
        lambda t: chunked(t.decoder + "/prefill", [b"1;", *[b"a" * 60_000] * 100]),
        400,
        "body_too_fine",
    ),
    "trailers": (
        lambda t: chunked(t.decoder + "/prefill", [b"1\r\n \r\n0\r\n", *[b"a: b\r\n" * 10_000] * 20]),
        400,
        "body_too_fine",
    ),
    "a chunk of 2^64": (lambda t: chunked(t.decoder + "/prefill", [b"10000000000000000\r\n"]), 400, "malformed"),
    "a chunk of -1": (lambda t: chunked(t.decoder + "/prefill", [b"-1\r\n"]), 400, "malformed"),
    "100,000 headers": (
        lambda t: [head("GET", t.decoder, *[f"a{at}: b" for at in range(100_000)])],
        431,
        "head_too_large",
    ),
    "a header of 10 MB": (lambda t: [b"GET / HTTP/1.1\r\na: ", *[b"b" * (1 << 20)] * 10], 431, "head_too_large"),
    "a header of 33 KB": (lambda t: [head("GET", t.decoder, "a: " + "b" * 33_000)], 431, "head_too_large"),
    "a path of 100 KB": (lambda t: [head("GET", "/" + "a" * 100_000)], 431, "head_too_large"),
    "a path of 10 MB": (lambda t: [b"GET /", *[b"a" * (1 << 20)] * 10], 431, "head_too_large"),
    "headers that trickle": (lambda t: trickle(b"GET / HTTP/1.1\r\na: ", b"b"), 408, "too_slow"),
    "a body that trickles": (
        lambda t: trickle(head("POST", t.decoder + "/prefill", "content-length: 1000"), b" "),
        408,
        "too_slow",
    ),
    "chunks that trickle": (
        lambda t: trickle(head("POST", t.decoder + "/prefill", "transfer-encoding: chunked"), b"1\r\n \r\n"),
        408,
        "too_slow",
    ),
    "no body": (lambda t: [head("POST", t.decoder + "/prefill", "content-length: 1000")], 408, "too_slow"),
    "not HTTP": (lambda t: [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)], 400, "malformed"),
    "a length of -1": (lambda t: [head("POST", t.decoder + "/prefill", "content-length: -1")], 400, "malformed"),
    "two lengths": (
        lambda t: [head("POST", t.decoder + "/prefill", "content-length: 2", "content-length: 3"), b"{}}"],
        400,
        "malformed",
    ),
    "a length and chunks": (
        lambda t: [head("POST", t.decoder + "/prefill", "content-length: 2", "transfer-encoding: chunked"), b"{}"],
        400,
        "malformed",
    ),
    "a length of 2^63 - 1": (
        lambda t: [head("POST", t.decoder + "/prefill", f"content-length: {2**63 - 1}")],
        413,
        "body_too_large",
    ),
    "a body without end": (
        lambda t: chunked(t.decoder + "/prefill", [b"10000\r\n" + b" " * 65536 + b"\r\n"] * 1000),
        413,
        "body_too_large",
    ),
    "a bomb of gzip": (
        lambda t: request(t.decoder + "/prefill", gzip.compress(bytes(100 << 20)), JSON, "content-encoding: gzip"),
        413,
        "body_too_large",
    ),
    "a bomb of deflate": (
        lambda t: request(t.decoder + "/prefill", zlib.compress(bytes(100 << 20)), JSON, "content-encoding: deflate"),
        413,
        "body_too_large",
    ),
    "a bomb as a past": (
        lambda t: request(
            t.decoder + "/past",
            gzip.compress(bytes(100 << 20)),
            SAFETENSORS_TYPE,
            "content-encoding: gzip",
            method="PUT",
        ),
        413,
        "body_too_large",
    ),
    "gzip in gzip": (
        lambda t: request(t.decoder + "/prefill", b"", JSON, "content-encoding: gzip, gzip"),
        415,
        "unsupported_media_type",
    ),
}


@contextmanager
def unharmed(target: Target, growth: int = GROWTH) -> Iterator[None]:
    """All that must hold after any attack, whatever it is answered."""
    before = [target.client.get(path).json()["version"] for path in (target.decoder, target.attention)]
    resident = target.memory("VmRSS")
    target.forget_peak()
    yield
    for path, version in zip((target.decoder, target.attention), before, strict=True):
        after = target.client.get(path).json()
        assert (after["version"], after["state"], after["valid_length"]) == (version, "idle", [3])
    assert target.memory("VmHWM") - resident < growth


def withstands(target: Target, parts: Iterable[bytes], status: int, code: str, growth: int = GROWTH) -> dict[str, Any]:
    """The problem that it is answered with."""
    with unharmed(target, growth):
        answered, media, body = exchange(target.address, parts)
    assert (answered, media) == (status, "application/problem+json"), body[:500]
    problem: dict[str, Any] = json.loads(body)
    assert problem["code"] == code, problem
    assert not LEAKS.search(body.decode()), body
    assert len(body) < 2000
    return problem


@pytest.mark.parametrize(("parts", "status", "code"), WIRE.values(), ids=WIRE.keys())
def test_the_wire(target: Target, parts: Raw, status: int, code: str) -> None:
    withstands(target, parts(target), status, code)


# ---- JSON ------------------------------------------------------------------------------------------------------------

MILLION = 1_000_000


def tensor(**fields: Any) -> bytes:
    return json.dumps({"query": {"dtype": "float32", "shape": [1, 1, 4], "data": [0] * 4} | fields}).encode()


def base64_of(size: int) -> str:
    return base64.b64encode(bytes(size)).decode()


# verb, body, status, code; a verb in capitals is a path of its own
BODIES: dict[str, tuple[str, bytes, int, str]] = {
    "depth of arrays": ("/prefill", b"[" * 100_000, 400, "malformed"),
    "depth of objects": ("/prefill", b'{"a":' * 100_000, 400, "malformed"),
    "depth in a tensor": ("/prefill", b'{"query":{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 400, "malformed"),
    "depth in labels": ("/v1/sessions", b'{"labels":' + b'{"a":' * 100_000, 400, "malformed"),
    "depth in a batch": ("/v1/batch/step", b'{"items":[' + b"[" * 100_000, 400, "malformed"),
    "a million names": ("/prefill", b'{"a":1%s}' % b"".join([b',"a":1'] * 600_000), 400, "malformed"),
    "a million labels": ("/v1/sessions", b'{"labels":{"a":""%s}}' % b"".join([b',"a":""'] * 500_000), 400, "malformed"),
    "a million empty lists": ("/prefill", b'{"token_ids":[[]%s]}' % b"".join([b",[]"] * MILLION), 422, "invalid_input"),
    "a million wrong ids": ("/prefill", b'{"token_ids":[[""%s]]}' % b"".join([b',""'] * MILLION), 422, "invalid_input"),
    "a million messages": ("/prefill", b'{"messages":[{}%s]}' % b"".join([b",{}"] * MILLION), 422, "invalid_input"),
    "a million items": ("/v1/batch/step", b'{"items":[{}%s]}' % b"".join([b",{}"] * MILLION), 422, "invalid_input"),
    "a million stops": ("/generate", b'{"stop":["a"%s]}' % b"".join([b',"a"'] * 900_000), 422, "invalid_input"),
    "a number of a million digits": ("/prefill", b'{"token_ids":[[%s]]}' % (b"9" * MILLION), 400, "malformed"),
    "an exponent": ("/prefill", b'{"sample":{"temperature":1e999999999}}', 422, "invalid_input"),
    "more JSON than there may be": ("/prefill", b" " * ((4 << 20) + 1), 413, "body_too_large"),
    "half of a surrogate": ("/prefill", b'{"text":"\\ud800"}', 400, "malformed"),
    "a negative dimension": ("/prefill", tensor(shape=[-1, 1, 4]), 422, "invalid_input"),
    "a dimension of 2^31": ("/prefill", tensor(shape=[2**31, 1, 4]), 422, "invalid_input"),
    "a dimension of 2^64 + 1": ("/prefill", tensor(shape=[2**64 + 1, 1, 4]), 422, "invalid_input"),
    "a product that wraps to 4": ("/prefill", tensor(shape=[2**30, 2**30, 2**4 + 1]), 422, "invalid_input"),
    "a product of 2^64": ("/prefill", tensor(shape=[2**16] * 4, data=[]), 422, "invalid_input"),
    "a product of 2^66 elements and no data": (
        "/prefill",
        tensor(shape=[2**30, 2**30, 2**6], data=[]),
        422,
        "invalid_input",
    ),
    "a zero that hides one": ("/prefill", tensor(shape=[0, 2**30, 2**30, 2**30], data=[]), 422, "invalid_input"),
    "nine axes": ("/prefill", tensor(shape=[1] * 9), 422, "invalid_input"),
    "a dimension of true": ("/prefill", tensor(shape=[True, 1, 4]), 422, "invalid_input"),
    "a byte short": ("/prefill", tensor(data=None, data_b64=base64_of(15)), 422, "invalid_input"),
    "a byte long": ("/prefill", tensor(data=None, data_b64=base64_of(17)), 422, "invalid_input"),
    "a number short": ("/prefill", tensor(data=[0] * 3), 422, "invalid_input"),
    "a number long": ("/prefill", tensor(data=[0] * 5), 422, "invalid_input"),
    "data that is nested too deep": ("/prefill", tensor(data=[[[[0]] * 4]]), 422, "invalid_input"),
    "-1 forks": ("/fork", b'{"count":-1}', 422, "invalid_input"),
    "257 forks": ("/fork", b'{"count":257}', 422, "invalid_input"),
    "2^63 forks": ("/fork", b'{"count":9223372036854775808}', 422, "invalid_input"),
    "forks at -1": ("/fork", b'{"at":-1}', 422, "invalid_input"),
    "truncated to -1": ("/truncate", b'{"length":-1}', 422, "invalid_input"),
    "truncated to 4 of 3": ("/truncate", b'{"length":4}', 422, "invalid_input"),
    "truncated to 2^63": ("/truncate", b'{"length":9223372036854775808}', 422, "invalid_input"),
    "truncated to 1.5": ("/truncate", b'{"length":1.5}', 422, "invalid_input"),
    'truncated to "2"': ("/truncate", b'{"length":"2"}', 422, "invalid_input"),
    "truncated to true": ("/truncate", b'{"length":true}', 422, "invalid_input"),
    "truncated to NaN": ("/truncate", b'{"length":NaN}', 422, "invalid_input"),
    "2^63 tokens": ("/generate", b'{"max_tokens":9223372036854775808}', 422, "invalid_input"),
    "-1 tokens": ("/generate", b'{"max_tokens":-1}', 422, "invalid_input"),
    "257 log-probabilities": ("/prefill", b'{"token_ids":[[1]],"top_logprobs":257}', 422, "invalid_input"),
    "1025 rows": ("/v1/sessions", b'{"model":"letters","batch_size":1025}', 422, "invalid_input"),
    "257 steps": ("/v1/batch/step", json.dumps({"items": [{"session_id": "a"}] * 257}).encode(), 422, "invalid_input"),
    "a time to live of for ever": ("/v1/sessions", b'{"model":"letters","ttl_seconds":1e300}', 422, "invalid_input"),
    "an id with a path": ("/v1/sessions", b'{"model":"letters","id":"../../etc/passwd"}', 422, "invalid_input"),
    "an id with a NUL": ("/v1/sessions", b'{"model":"letters","id":"a\\u0000"}', 422, "invalid_input"),
    "an id with a line": ("/v1/sessions", b'{"model":"letters","id":"a\\n"}', 422, "invalid_input"),
    "an id of 4 KB": ("/v1/sessions", b'{"model":"letters","id":"%s"}' % (b"a" * 4096), 422, "invalid_input"),
    "a model with a path": ("/v1/sessions", b'{"model":"../../etc/passwd"}', 404, "model_not_found"),
}


@pytest.mark.parametrize(("verb", "body", "status", "code"), BODIES.values(), ids=BODIES.keys())
def test_json(target: Target, verb: str, body: bytes, status: int, code: str) -> None:
    session = target.attention if b'"query"' in body else target.decoder
    path = verb if verb.startswith("/v1") else session + verb
    withstands(target, request(path, body), status, code, GROWTH + (PARSED * len(body) >> 20))


# ---- safetensors -----------------------------------------------------------------------------------------------------

ZEROS = {"dtype": "F32", "shape": [1, 1, 4], "data_offsets": [0, 16]}


def file(header: bytes | dict[str, Any], data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def zeros(**fields: Any) -> bytes:
    return file({"query": ZEROS | fields})


ENTRY = json.dumps(ZEROS).encode()
FILES: dict[str, bytes] = {
    "a header of 2^62": struct.pack("<Q", 2**62) + b"{}" + bytes(16),
    "a header of 2^64 - 1": b"\xff" * 8 + b"{}",
    "a header of 1 more than there is": struct.pack("<Q", 3) + b"{}",
    "a header of 1": struct.pack("<Q", 1) + b"{",
    "a deep header": file(b"[" * 100_000),
    "a header of a million names": file(b'{"a":1%s}' % b"".join([b',"a%d":1' % at for at in range(400_000)])),
    "equal names": file(b'{"query":%s,"query":%s}' % (ENTRY, ENTRY)),
    "a name of 100 KB": file({"a" * 100_000: ZEROS}),
    "a negative dimension": zeros(shape=[-1, 1, 4]),
    "a dimension of 2^64": zeros(shape=[2**64, 1, 4]),
    "a product that wraps to 4": zeros(shape=[2**62, 1, 4 + 2**2]),
    "a zero that hides a product": zeros(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "offsets out of range": zeros(data_offsets=[0, 2**62]),
    "offsets that go back": zeros(data_offsets=[16, 0]),
    "negative offsets": zeros(data_offsets=[-16, 0]),
    "offsets that overlap": file({"query": ZEROS, "key": ZEROS | {"data_offsets": [8, 24]}}, bytes(24)),
    "a hole": file({"query": ZEROS, "key": ZEROS | {"data_offsets": [20, 36]}}, bytes(36)),
    "a byte short": file({"query": ZEROS}, bytes(15)),
    "a byte long": file({"query": ZEROS}, bytes(17)),
    "an unknown dtype": zeros(dtype="F4096"),
    "metadata that is no text": file({"__metadata__": {"a": {"b": 1}}, "query": ZEROS}),
    "pickle": pickle.dumps({"query": [1.0]}),
    "a zip, as torch writes it": b"PK\x03\x04" + bytes(200),
    "nothing": b"",
    "not UTF-8": file(b'{"\xff":1}'),
}


@pytest.mark.parametrize("body", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("verb", ["/prefill", "/past", "/v1/batch/step"])
def test_safetensors(target: Target, verb: str, body: bytes) -> None:
    path, method = (verb, "POST") if verb.startswith("/v1") else (target.attention + verb, "POST")
    parts = request(path, body, SAFETENSORS_TYPE, method="PUT" if verb == "/past" else method)
    resident = target.memory("VmRSS")
    target.forget_peak()
    status, media, reply = exchange(target.address, parts)
    assert (status in (400, 422), media) == (True, "application/problem+json"), reply[:300]
    assert not LEAKS.search(reply.decode())
    assert len(reply) < 2000
    assert target.memory("VmHWM") - resident < GROWTH
    assert target.client.get(target.attention).json()["version"] == 1


# ---- the Open Inference Protocol -------------------------------------------------------------------------------------

QUERY = {"name": "query", "datatype": "FP32", "shape": [1, 1, 4], "parameters": {"binary_data_size": 16}}
OTHERS = [QUERY | {"name": name} for name in ("key", "value")]
MASK = {"name": "attention_mask", "datatype": "BOOL", "shape": [1, 1, 1], "data": [True]}


def infer(query: object, tail: bytes = bytes(16), header: object = None, *more: str, **fields: Any) -> list[bytes]:
    """The query as it is said, and zeros for the rest."""
    text = json.dumps({"inputs": [query, *OTHERS, MASK], **fields}).encode()
    size = f"inference-header-content-length: {len(text) if header is None else header}"
    return request("/v2/models/echo/infer", text + tail + bytes(32), "application/octet-stream", size, *more)


def said(**fields: Any) -> dict[str, Any]:
    return QUERY | fields


def sized(size: object) -> dict[str, Any]:
    return said(parameters={"binary_data_size": size})


def in_json(body: bytes, model: str = "echo") -> list[bytes]:
    return request(f"/v2/models/{model}/infer", body)


V2: dict[str, tuple[list[bytes], int]] = {
    "a byte short": (infer(QUERY, bytes(15)), 400),
    "a byte long": (infer(QUERY, bytes(17)), 400),
    "a size off by one": (infer(sized(17), bytes(17)), 422),
    "a size of the next one's bytes": (infer(sized(32), b""), 400),
    "a size of -16": (infer(sized(-16)), 422),
    "a size of 2^62": (infer(sized(2**62)), 400),
    "a size of 2^64 + 16": (infer(sized(2**64 + 16)), 422),
    "a size of 4,000 digits": (infer(sized(int("9" * 4000))), 422),
    "a size that is a text": (infer(sized("16")), 422),
    "a negative dimension": (infer(said(shape=[-1, -1, 4])), 422),
    "a dimension of 2^64": (infer(said(shape=[2**64, 1, 4])), 422),
    "a product that wraps to 4": (infer(said(shape=[2**30, 2**30, 16 + 4])), 422),
    "a product of 2^62 with its size": (infer(said(shape=[2**30, 2**30], parameters={"binary_data_size": 2**62})), 400),
    "a zero that hides a product": (infer(sized(0) | {"shape": [0, 2**30, 2**30, 2**30]}, b""), 422),
    "a million axes": (
        in_json(b'{"inputs":[{"name":"query","datatype":"FP32","shape":[1%s]}]}' % (b",1" * MILLION)),
        422,
    ),
    "a header of 0": (infer(QUERY, header=0), 400),
    "a header of 1 more than the body": (infer(QUERY, header=100_000), 400),
    "a header of a byte less": (infer(QUERY, header=len(json.dumps({"inputs": [QUERY, *OTHERS, MASK]})) - 1), 400),
    "a header of -1": (infer(QUERY, header=-1), 400),
    "a header of 2^64": (infer(QUERY, header=2**64), 400),
    "a header of 2^58": (infer(QUERY, header=2**58), 413),
    "a header that is none": (infer(QUERY, header="0x10"), 400),
    "two headers": (infer(QUERY, bytes(16), None, "inference-header-content-length: 1"), 400),
    "named twice": (infer(QUERY | {"name": "key"}), 422),
    "a million names": (in_json(b'{"inputs":[{%s"name":"query"}]}' % (b'"a":1,' * 600_000)), 400),
    "a million inputs": (in_json(b'{"inputs":[{}%s]}' % (b",{}" * MILLION)), 422),
    "a million outputs": (infer(QUERY, outputs=[{"name": "attn_out"}] * 50_000), 422),
    "a million parameters": (infer(QUERY, parameters={f"a{at}": 1 for at in range(50_000)}), 422),
    "depth": (in_json(b'{"inputs":' + b"[" * 100_000), 400),
    "depth of data": (in_json(b'{"inputs":[{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}"), 400),
    "a million empty lists": (
        in_json(b'{"inputs":[{"name":"query","datatype":"FP32","shape":[1],"data":[[]%s]}]}' % (b",[]" * MILLION)),
        422,
    ),
    "a string of 4 GB": (
        request(
            "/v2/models/letters/infer",
            (
                text := json.dumps(
                    {
                        "inputs": [
                            {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}
                        ]
                    }
                ).encode()
            )
            + b"\xff\xff\xff\xffa",
            "application/octet-stream",
            f"inference-header-content-length: {len(text)}",
        ),
        422,
    ),
    "2^30 strings": (
        in_json(b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[1073741824],"data":[]}]}', "letters"),
        422,
    ),
    "a past of 2^60": (
        infer(QUERY | {"name": "key_past", "shape": [2**30, 1, 4, 2**28], "parameters": {"binary_data_size": 16}}),
        422,
    ),
    "shared memory": (infer(said(parameters={"shared_memory_region": "/dev/shm/x"})), 422),
    "a model with a path": (request("/v2/models/..%2f..%2fetc%2fpasswd/infer", b"{}"), 404),
    "a version with a path": (request("/v2/models/echo/versions/..%2f1/infer", b"{}"), 404),
    "a sequence of 64 KB": (infer(QUERY, parameters={"sequence_id": "a" * 65_536, "sequence_start": True}), 422),
    "a sequence of 2^64": (infer(QUERY, parameters={"sequence_id": 2**64, "sequence_start": True}), 422),
    "pickle": (request("/v2/models/echo/infer", pickle.dumps({"query": [1.0]})), 400),
    "a bomb": (
        request(
            "/v2/models/echo/infer",
            gzip.compress(bytes(100 << 20)),
            "application/octet-stream",
            "content-encoding: gzip",
            "inference-header-content-length: 1000",
        ),
        413,
    ),
    "no key": ([head("POST", "/v2/models/echo/infer", "content-length: 0", key=None)], 401),
}


@pytest.mark.parametrize(("parts", "status"), V2.values(), ids=V2.keys())
def test_inference(target: Target, parts: list[bytes], status: int) -> None:
    open_now = len(target.client.get("/v1/sessions").json()["data"])
    with unharmed(target, GROWTH + (PARSED * sum(map(len, parts)) >> 20)):
        answered, media, body = exchange(target.address, parts)
    assert (answered, media) == (status, "application/json"), body[:500]
    assert list(json.loads(body)) == ["error"]
    assert not LEAKS.search(body.decode()), body
    assert len(body) < 2000
    assert len(target.client.get("/v1/sessions").json()["data"]) == open_now


# ---- ids and keys ----------------------------------------------------------------------------------------------------

IDS = [
    "..",
    "../..",
    "%2e%2e",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "a%00",
    "%00",
    "a" * 4096,
    "%ff%fe",
    "%u002e",
    "a%0d%0aX:1",
]


@pytest.mark.parametrize("session_id", IDS)
def test_ids_are_names_and_no_paths(target: Target, session_id: str) -> None:
    for verb in ("", "/past"):
        status, media, body = exchange(target.address, [head("GET", f"/v1/sessions/{session_id}{verb}")])
        assert (status, media) == (404, "application/problem+json")
        assert json.loads(body)["code"] in ("session_not_found", "not_found")
        assert b"root:" not in body
    assert target.client.get(target.decoder).status_code == 200


KEYS: dict[str, tuple[list[str], int]] = {
    "none": ([], 401),
    "forged": ([f"authorization: Bearer {KEY[:-2]}AA"], 401),
    "over": ([f"authorization: Bearer {OVER_KEY}"], 401),
    "unknown": ([f"authorization: Bearer {new_key('alice')[0]}"], 401),
    "of 30 KB": ([f"x-api-key: {'a' * 30_000}"], 401),
    "a hash": ([f"x-api-key: {USER.hashed.hex()}"], 401),
    "two": ([f"x-api-key: {KEY}", f"x-api-key: {ADMIN_KEY}"], 401),
    "bytes": (["x-api-key: \u00ff\u00fe"], 401),
    "a user's": ([f"x-api-key: {KEY}"], 403),
}


@pytest.mark.parametrize(("headers", "status"), KEYS.values(), ids=KEYS.keys())
def test_admins_door_stays_shut(target: Target, headers: list[str], status: int) -> None:
    for method, path in (("GET", "/v1/admin/sessions"), ("POST", "/v1/admin/drain"), ("GET", "/v1/admin/check")):
        answered, _, body = exchange(target.address, [head(method, path, "content-length: 0", *headers, key=None)])
        assert answered == status, body
        assert KEY.encode() not in body
    assert target.client.get("/readyz").json()["status"] == "ready"


# ---- connections -----------------------------------------------------------------------------------------------------


def test_a_reader_who_takes_nothing_is_let_go(target: Target) -> None:
    asked = head("GET", "/openapi.json") * 400
    with socket.create_connection(target.address, 10) as connection:
        connection.sendall(asked)
        until(lambda: is_held(connection))
        until(lambda: not is_held(connection))
        got = 0
        with suppress(ConnectionError):
            while more := connection.recv(1 << 20):
                got += len(more)
    whole = len(target.client.get("/openapi.json").content) * 400
    assert got < whole / 2


def test_a_connection_that_says_nothing_is_closed(target: Target) -> None:
    with socket.create_connection(target.address, 10) as connection:
        assert connection.recv(1) == b""


def test_all_bodies_together_are_bounded(target: Target) -> None:
    """16 clients send all but the last byte of 8 MiB each. Two fit into half of 32 MiB, and steps go on beside them."""
    size = 8 << 20
    told = (f"content-type: {SAFETENSORS_TYPE}", f"content-length: {size}")
    opening = head("POST", target.attention + "/prefill", *told) + bytes(size - 1)
    with unharmed(target), ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(target.address, 20)) for _ in range(16)]
        for client in clients:
            with suppress(OSError):  # the refused ones may not get rid of it all
                client.sendall(opening)
        answered = select.select(clients, [], [], 10)[0]
        for path, kind in ((target.decoder, KINDS["decoder"]), (target.attention, KINDS["attention"])):
            assert target.client.post(f"{path}/score", json=kind.json(1, 3)).status_code == 200
        for client in answered:
            reply = client.recv(4096)
            assert reply.startswith(b"HTTP/1.1 503 ")
            assert b"bodies_full" in reply
            assert b"retry-after: 1" in reply.lower()
        assert len(answered) == 14
    withstands(target, request(target.attention + "/prefill", bytes(size), SAFETENSORS_TYPE), 400, "malformed")


@pytest.mark.slow
def test_connections_are_bounded_and_come_free() -> None:
    with Server("tests.e2e.quick_service", max_connections="4") as server:
        url = httpx.URL(server.address())
        address = url.host, url.port or 80
        with httpx.Client(base_url=url) as client:
            assert client.get("/livez").status_code == 200
            held = [socket.create_connection(address, 10) for _ in range(3)]
            time.sleep(0.2)
            status, media, _ = exchange(address, [head("GET", "/livez")])
            assert (status, media) == (503, "application/problem+json")
            assert client.get("/livez").status_code == 200
            for connection in held:
                connection.close()
            time.sleep(0.2)
            assert exchange(address, [head("GET", "/livez")])[0] == 200


@pytest.mark.slow
def test_a_removed_key_is_refused_soon(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    write_keys(keys, [USER, ADMIN])
    with Server("tests.e2e.quick_service", keys_file=str(keys)) as server:
        with httpx.Client(base_url=server.address(), headers={"x-api-key": KEY}) as client:
            assert client.get("/v1/sessions").status_code == 200
            write_keys(keys, [record for record in read_keys(keys).values() if record.id != USER.id])
            until = time.monotonic() + 10
            while client.get("/v1/sessions").status_code == 200 and time.monotonic() < until:
                time.sleep(0.1)
            assert client.get("/v1/sessions").status_code == 401
            assert client.get("/v1/sessions", headers={"x-api-key": ADMIN_KEY}).status_code == 200
        server.process.terminate()
        code, printed = server.ends()
    assert code == 0
    assert KEY not in printed
    assert ADMIN_KEY not in printed
