"""What a request of 4 KB costs our service, and a Triton server (PyTriton): microseconds of wall time a request at 1,
16 and 64 connections, the same client on both sides, in turn.

Theirs echoes an FP16 tensor of 4,096 bytes, as binary data of the Open Inference Protocol. Ours gives as many back:

    echo route           from a FastAPI route in the service's own application, behind its connection, keys, limits and
                         logs: what the HTTP stack takes, without a model
    append, less engine  as the outputs of 32 queries of width 64 to a session of the real service, safetensors: a
                         request's time less the model's turns, as `keypast_batch_seconds` counts them meanwhile (those,
                         too, that ran while another request was read or written)
    append               the same with the model's turns in it
    infer, less engine   the same queries by the protocol that theirs speaks, to a sequence

There are as many sessions as connections. Theirs has neither sessions nor a model; ours is without them in the first
line only. Bound: the client's own share, some 20 microseconds a request (wrk) on the same cores.

    python -m benchmarks.vs_pytriton --python PATH [--rounds 5] [--seconds 3] [--save]

PATH is an interpreter with nvidia-pytriton (`benchmarks/peers/setup.sh` makes one).
"""

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.compare import HEADER, Pairs, interleave, report
from benchmarks.peers.http import metrics
from benchmarks.peers.load import CLIENT, Requests
from benchmarks.peers.servers import Keypast, Process, Trivial, free_port
from keypast import Client, oip
from keypast.wire import OCTETS_TYPE, SAFETENSORS_TYPE, dump_tensors

BYTES, WIDTH = 4096, 64
COUNT = BYTES // 2 // WIDTH  # queries
CONNECTIONS = (1, 16, 64)
GOALS = {1: 10, 16: 6, 64: 5}
FIRST_ID = 1001  # the ids of sequences have four digits, so that all requests are equally long
HOUR = 3600

Arrays = dict[str, np.ndarray[Any, Any]]
BEGINNING: Arrays = {name: np.ones((1, 1, WIDTH), np.float16) for name in ("query", "key", "value")}
BEGINNING["attention_mask"] = np.ones((1, 1, 1), np.uint8)
QUERIES: Arrays = {
    "query": np.ones((1, COUNT, WIDTH), np.float16),
    "attention_mask": np.ones((1, COUNT, 1), np.uint8),
}


class Service:
    """Requests to ours, each an append of queries alone, which leaves its session as it was."""

    def __init__(self, port: int) -> None:
        self.port = port
        most = range(max(CONNECTIONS))
        with Client(f"http://127.0.0.1:{port}") as client:
            self._sessions = [client.sessions.create("layer", ttl_seconds=HOUR) for _ in most]
            for session in self._sessions:
                session.prefill(**BEGINNING)  # type: ignore[arg-type]
        self._sequences = [{"sequence_id": FIRST_ID + index} for index in most]
        begin = [{**sequence, "sequence_start": True} for sequence in self._sequences]
        asyncio.run(infer_requests(port, "layer", BEGINNING, "attn_out", begin).once())

    def appends(self, connections: int) -> Requests:
        body = dump_tensors(QUERIES, {})
        posts = [(f"/v1/sessions/{session.id}/prefill", body) for session in self._sessions[:connections]]
        return Requests(self.port, posts, {"Content-Type": SAFETENSORS_TYPE})

    def infers(self, connections: int) -> Requests:
        return infer_requests(self.port, "layer", QUERIES, "attn_out", self._sequences[:connections])

    def less_engine_us(self, requests: Requests, connections: int, seconds: float) -> float:
        before = self._turns()
        each = us(requests, connections, seconds)
        turned, rows = (after - at for after, at in zip(self._turns(), before, strict=True))
        return each - 1e6 * turned / rows

    def _turns(self) -> tuple[float, float]:
        """Seconds that the model's turns have taken since the start, and requests in them."""
        told = metrics(self.port)

        def total(what: str) -> float:
            return sum(value for name, value in told.items() if name.startswith(f"keypast_batch_{what}_sum{{"))

        return total("seconds"), total("rows")


def infer_requests(port: int, model: str, tensors: Arrays, output: str, parameters: list[dict[str, Any]]) -> Requests:
    """One for each of `parameters`, which must be equally long."""
    inputs = [
        {
            "name": name,
            "datatype": oip.DATATYPES[array.dtype.name],
            "shape": array.shape,
            "parameters": {oip.SIZE: array.nbytes},
        }
        for name, array in tensors.items()
    ]
    told = {"inputs": inputs, "outputs": [{"name": output, "parameters": {"binary_data": True}}]}
    heads = [json.dumps({**told, "parameters": own}).encode() for own in parameters]
    data = b"".join(array.tobytes() for array in tensors.values())
    headers = {"Content-Type": OCTETS_TYPE, oip.HEADER: str(len(heads[0]))}
    return Requests(port, [(f"/v2/models/{model}/infer", head + data) for head in heads], headers)


def us(requests: Requests, connections: int, seconds: float) -> float:
    return 1e6 / requests.a_second(connections, seconds)


def pytriton_version(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('nvidia-pytriton'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def compare(
    ours: Service, bare: Requests, echo: Requests, theirs: Requests, options: argparse.Namespace
) -> list[Pairs]:
    results = []
    for n in CONNECTIONS:
        seconds, goal = options.seconds, GOALS[n]
        appends, infers = ours.appends(n), ours.infers(n)
        sides: tuple[tuple[str, int | None, Callable[[], float]], ...] = (
            ("FastAPI", None, partial(us, bare, n, seconds)),
            ("echo route", goal, partial(us, echo, n, seconds)),
            ("append, less engine", goal, partial(ours.less_engine_us, appends, n, seconds)),
            ("append", None, partial(us, appends, n, seconds)),
            ("infer, less engine", None, partial(ours.less_engine_us, infers, n, seconds)),
        )
        for name, wanted, side in sides:
            pairs = Pairs(f"{name}, {n} connections", "PyTriton", "us", "less", wanted)
            results.append(interleave(pairs, side, partial(us, theirs, n, seconds), options.rounds))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    versions = {"pytriton": pytriton_version(options.python), "client": CLIENT}
    echo_port, triton_port = free_port(), free_port()
    echo = [sys.executable, "-m", "benchmarks.peers.echo", str(echo_port)]
    worker = Path(__file__).parent / "peers" / "pytriton_worker.py"  # -I: it must not find the modules beside it
    with (
        Keypast(models=f"layer=attention:hidden={WIDTH},heads=1", sequence_seconds=str(HOUR)) as keypast,
        Process(echo, {}, echo_port) as plain,
        Trivial("fastapi_app") as trivial,
        Process([str(options.python), "-I", str(worker), str(triton_port)], {}, triton_port) as triton,
    ):
        for process, path in (
            (keypast, "/readyz"),
            (plain, "/readyz"),
            (trivial, "/openapi.json"),
            (triton, "/v2/models/echo"),
        ):
            asyncio.run(process.ready(path))
        bare = Requests(trivial.port, [("/echo", bytes(BYTES))])
        echoed = Requests(echo_port, [("/echo", bytes(BYTES))])
        theirs = infer_requests(triton_port, "echo", {"x": np.ones((1, BYTES // 2), np.float16)}, "y", [{}])
        print(HEADER)
        results = compare(Service(keypast.port), bare, echoed, theirs, options)
    report("vs_pytriton", results, versions, options.save)


if __name__ == "__main__":
    main()
