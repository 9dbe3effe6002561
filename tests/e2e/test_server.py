"""The server as a process, over a real socket: what it prints, how it drains, how it exits."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Self

import httpx
import numpy as np
import pytest

from keypast import Client, errors
from tests.service.fakes import KINDS, Kind, event_data

ROOT = Path(__file__).parents[2]
FAKES = "tests.e2e.fake_service"


class Server:
    """`lines` as they are printed."""

    def __init__(self, module: str, *arguments: str, **settings: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("KEYPAST_")}
        environment |= {f"KEYPAST_{key.upper()}": value for key, value in ({"port": "0"} | settings).items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        self._printed: Queue[str] = Queue()
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)

    def address(self) -> str:
        """Waits until it says where it is."""
        return self.line(r"keypast serves .* on (http://\S+)")[1]

    def line(self, pattern: str, seconds: float = 100) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self.lines.append(self._printed.get(timeout=0.1))
            except Empty:
                continue
            if match := re.match(pattern, self.lines[-1]):
                return match
        raise AssertionError(f"{pattern} was not printed, but {self.lines}")

    def ends(self, seconds: float = 60) -> tuple[int, str]:
        """Exit code and all that was printed."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        while not self._printed.empty():
            self.lines.append(self._printed.get())
        return code, "\n".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as printed:
            for line in printed:
                self._printed.put(line.rstrip())


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(FAKES) as running:
        yield running


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def until(condition: Callable[[], bool]) -> None:
    """Fails the test by its time limit when it never holds."""
    while not condition():
        time.sleep(0.01)


def prefilled(client: httpx.Client, kind: Kind) -> str:
    created = client.post("/v1/sessions", json={"model": kind.model})
    path = created.headers["location"]
    assert client.post(f"{path}/prefill", json=kind.json(3)).status_code == 200
    return str(path)


def test_what_it_says_to_try_works(server: Server) -> None:
    address = server.address()
    assert server.line(r"  try  keypast (?:chat|models) --url (\S+)$")[1] == address
    curl = server.line(r" +curl --json '(.+)' (\S+)$")
    assert httpx.post(curl[2], content=curl[1], headers={"Content-Type": "application/json"}).status_code == 201
    assert server.line(r"  see  (\S+)/docs$")[1] == address


def test_sigterm_drains_and_exits_0(server: Server, kind: Kind) -> None:
    address = server.address()
    with httpx.Client(base_url=address) as client, ThreadPoolExecutor() as threads:
        path = prefilled(client, kind)
        step = threads.submit(httpx.post, f"{address}{path}/step", json=kind.json(1, 3), timeout=30)
        until(lambda: client.get(path).json()["state"] == "running")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").json()["status"] == "draining")
        refused = client.post(f"{path}/step", json=kind.json(1, 3))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (step.result().status_code, step.result().json()["valid_length"]) == (200, [4])
    code, printed = server.ends()
    assert code == 0
    assert "Traceback" not in printed
    assert f"POST {path}/step 200" in printed


def test_sigterm_cuts_a_stream_short_and_ends_it_well() -> None:
    with (
        Server(FAKES, "0.2", drain_seconds="0.1") as server,
        httpx.Client(base_url=server.address(), timeout=30) as client,
    ):
        path = prefilled(client, KINDS["decoder"])
        with client.stream("POST", f"{path}/generate", json={"max_tokens": 50, "stream": True}) as stream:
            parts = stream.iter_text()
            text = next(parts)
            server.process.send_signal(signal.SIGTERM)
            text += "".join(parts)
        *tokens, end, done = event_data(text)
        assert (end["finish_reason"], done) == (["cancelled"], "[DONE]")
        assert 1 <= len(tokens) < 20
        code, printed = server.ends()
        assert (code, "Traceback" in printed) == (0, False)


def test_a_stream_comes_token_by_token_and_ends_with_its_reader(server: Server) -> None:
    with httpx.Client(base_url=server.address(), timeout=30) as client:
        path = prefilled(client, KINDS["decoder"])
        with client.stream("POST", f"{path}/generate", json={"max_tokens": 50, "stream": True}) as stream:
            first = next(stream.iter_text())
        assert len(event_data(first)) <= 2
        until(lambda: client.get(path).json()["state"] == "idle")
        assert client.get(path).json()["valid_length"][0] <= 7
    server.process.send_signal(signal.SIGINT)
    assert server.ends()[0] == 0


def test_a_second_signal_does_not_wait(server: Server) -> None:
    with httpx.Client(base_url=server.address()) as client, ThreadPoolExecutor() as threads:
        path = prefilled(client, KINDS["decoder"])
        body = {"max_tokens": 90}
        threads.submit(httpx.post, f"{client.base_url}{path}/generate", json=body, timeout=30)
        until(lambda: client.get(path).json()["state"] == "running")
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert server.ends(5)[0] == 1


def test_a_body_that_is_too_long_ends_the_connection() -> None:
    with Server(FAKES, max_body_bytes="2000") as server, httpx.Client(base_url=server.address()) as client:
        path = client.post("/v1/sessions", json={"model": "letters"}).headers["location"]
        for body in (b" " * 3000, iter([b" " * 1500] * 2)):
            reply = client.post(f"{path}/prefill", content=body)
            assert (reply.status_code, reply.headers["connection"]) == (413, "close")
        assert client.get("/livez").status_code == 200


def test_a_port_in_use_is_one_clear_line() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with Server(FAKES, port=str(port)) as server:
            code, printed = server.ends()
    assert code == 1
    assert (
        printed
        == f"keypast: cannot listen on 127.0.0.1 port {port}: Address already in use; set KEYPAST_HOST or KEYPAST_PORT"
    )


def test_a_bad_setting_is_one_clear_line() -> None:
    with Server("service", port="http") as server:
        code, printed = server.ends()
    assert code == 2
    assert printed.startswith("keypast: KEYPAST_PORT=http: ")
    assert "\n" not in printed


def test_a_model_that_is_not_there_is_one_clear_line() -> None:
    with Server("service", models="a=/no/such/model", attention_backend="sdpa") as server:
        code, printed = server.ends()
    assert code == 1
    assert printed.splitlines()[-1].startswith("keypast: ")
    assert "/no/such/model" in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_the_attention_layer_over_the_wire(tmp_path: Path) -> None:
    """The real loader and the real layer, by itself and as cross-attention, in two dtypes; and a real end."""
    models = "default=attention:hidden=8,heads=2 layer=attention:hidden=8,heads=2,dtype=float32"
    settings = {"models": models, "kv_memory": "16MiB", "kv_dtype": "float32", "attention_backend": "sdpa"}
    with Server("service", cache_dir=str(tmp_path), **settings) as server:
        address = server.address()
        with httpx.Client(base_url=address, timeout=30) as client:
            _chunked(client)
        for binary in (True, False):
            with Client(address, binary=binary) as client_of_ours:
                _cross(client_of_ours)
        server.process.send_signal(signal.SIGTERM)
        code, printed = server.ends()
    assert (code, "Traceback" in printed) == (0, False)


def _chunked(client: httpx.Client) -> None:
    """Two steps after one prefill are as one prefill of all."""
    outputs = []
    for chunks in ([3, 1, 1], [5]):
        path = client.post("/v1/sessions", json={"model": "default"}).headers["location"]
        past = 0
        for n in chunks:
            reply = client.post(f"{path}/prefill", json=_chunk(past, n))
            assert reply.status_code == 200, reply.text
            past += n
        outputs.append(reply.json()["outputs"]["attn_out"]["data"][0][-1])
    assert outputs[0] == pytest.approx(outputs[1], abs=2e-2)
    assert client.get("/v1/models").json()["data"][0]["kind"] == "attention"


def _cross(client: Client) -> None:
    """Rows of 5 and 3 keys brought once and asked by queries alone, at once and one by one; rows then grow."""
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(2, n, 8)).astype(np.float32) for n in (6, 5, 5))
    mask = random.random((2, 6, 5)) < 0.6
    shapes = {tensor.name: tensor.shape for card in client.models() for tensor in card.inputs if card.id == "layer"}
    assert (shapes["query"], shapes["key"]) == (["B", "n", 8], ["B", "m", 8])
    whole = client.sessions.create("layer", batch_size=2).prefill(
        query=query, key=key, value=value, attention_mask=mask, batch_valid_length=[5, 3]
    )
    session = client.sessions.create("layer", batch_size=2)
    with pytest.raises(errors.WrongState):
        session.step(query=query[:, :1])
    session.prefill(key=key, value=value, batch_valid_length=[5, 3])
    asked = [session.prefill(query=query, attention_mask=mask, need_weights=True)]
    asked += [session.step(query=query[:, at : at + 1], attention_mask=mask[:, at : at + 1]) for at in range(6)]
    assert {(result.version, *result.valid_length) for result in asked} == {(1, 5, 3)}
    expected, at_once, *stepped = (np.asarray(result.attn_out) for result in (whole, *asked))
    for attn_out in (at_once, np.concatenate(stepped, axis=1)):
        np.testing.assert_allclose(attn_out, expected, atol=1e-5)
    assert asked[0].attn_weights is not None
    assert not asked[0].attn_weights[1, :, 3:].any()
    session.step(query=query[:, :1], key=key[:, :1], value=value[:, :1])
    assert (session.valid_length, session.version) == ([6, 4], 2)


def _chunk(past: int, n: int) -> dict[str, object]:
    """Positions past to past + n of one fixed sequence, under a causal mask."""
    values = [[[((past + i) * 8 + j) % 11 / 11 for j in range(8)] for i in range(n)]]
    mask = [[[int(t <= past + i) for t in range(past + n)] for i in range(n)]]
    tensor = {"dtype": "float32", "shape": [1, n, 8], "data": values}
    masked = {"dtype": "bool", "shape": [1, n, past + n], "data": mask}
    return {"query": tensor, "key": tensor, "value": tensor, "attention_mask": masked}
