"""Requests of the Open Inference Protocol by hand, and their replies."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
import numpy as np

from keypast.oip import DATATYPES, HEADER
from keypast.wire import Array
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import Running
from tests.service.fakes import Fakes


class Told(NamedTuple):
    """A reply: its JSON, and its outputs by name."""

    reply: httpx.Response
    head: dict[str, Any]
    outputs: dict[str, Array]


def asked(arrays: Mapping[str, Array], *, binary: bool = True, **fields: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers, as the protocol has them."""
    inputs, tail = [], b""
    for name, array in arrays.items():
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": DATATYPES[array.dtype.name],
            "shape": list(array.shape),
        }
        if not binary:
            tensor["data"] = [x.decode() for x in array.flat] if array.dtype == object else array.ravel().tolist()
        else:
            own = b"".join(len(x).to_bytes(4, "little") + x for x in array.flat) if array.dtype == object else b""
            own = own or array.tobytes()
            tensor["parameters"] = {"binary_data_size": len(own)}
            tail += own
        inputs.append(tensor)
    text = json.dumps({"inputs": inputs, **fields}).encode()
    return text + tail, {HEADER: str(len(text))} if binary else {}


async def post(
    running: Running,
    model: str,
    arrays: Mapping[str, Array],
    *,
    binary: bool = True,
    headers: Mapping[str, str] | None = None,
    version: str = "",
    **fields: Any,
) -> httpx.Response:
    content, own = asked(arrays, binary=binary, **fields)
    path = f"/v2/models/{model}{version}/infer"
    return await running.client.post(path, content=content, headers={**own, **(headers or {})})


def told(reply: httpx.Response) -> Told:
    assert reply.status_code == 200, reply.text
    content = reply.content
    size = int(reply.headers.get(HEADER, len(content)))
    head, tail = json.loads(content[:size]), content[size:]
    outputs = {}
    dtypes = {datatype: dtype for dtype, datatype in DATATYPES.items()}
    for tensor in head["outputs"]:
        dtype = dtypes[tensor["datatype"]]
        if "data" in tensor:
            array = np.array(tensor["data"], dtype)
        elif dtype == "object":
            length = tensor["parameters"]["binary_data_size"]
            array, tail = np.array(_split(tail[:length]), object), tail[length:]
        else:
            length = tensor["parameters"]["binary_data_size"]
            array, tail = np.frombuffer(tail[:length], dtype), tail[length:]
        outputs[tensor["name"]] = array.reshape(tensor["shape"])
    assert tail == b""
    return Told(reply, head, outputs)


def _split(data: bytes) -> list[str]:
    strings = []
    while data:
        size = int.from_bytes(data[:4], "little")
        strings.append(data[4 : 4 + size].decode())
        data = data[4 + size :]
    return strings


def refused(reply: httpx.Response, status: int, *words: str) -> str:
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json"), reply.text
    body: dict[str, str] = reply.json()
    assert list(body) == ["error"]
    for word in words:
        assert word in body["error"], body
    for secret in ("/secret", "0x7f", "Traceback", "/work"):
        assert secret not in reply.text
    return body["error"]


def sequence(given: int | str, *, start: bool = False, end: bool = False, **more: Any) -> dict[str, Any]:
    named = {"sequence_id": given, "sequence_start": start, "sequence_end": end, "binary_data_output": True}
    return {"parameters": named | more}


@asynccontextmanager
async def served() -> AsyncIterator[Running]:
    """A service of its own for each example."""
    fakes = Fakes.build()
    app = create_app(lambda progress: fakes.loaded(), Settings(drain_seconds=1.0))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://k")
    async with app.router.lifespan_context(app), client:
        await app.state.service.loaded()
        yield Running(app, client, fakes)
    fakes.engine.check()
