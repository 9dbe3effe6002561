"""A decoder's step through HTTP, against the engine's own step in the same process and at the same moment.

Bound: the engine's step. What is above 1.0 is HTTP, JSON, two thread changes and the client. The service is a real one
(uvicorn, its own process), the client is a raw socket on the same machine. `compute_ms` of each reply is the engine's
share, measured by the service, so both sides of the ratio come from one request.

    python -m benchmarks.http_step [--context 256] [--steps 200] [--rounds 5]
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from keypast import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    port = free_port()
    service = start_service(port)
    try:
        with Client(f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_ready(client, service)
            rounds = [measure(client, port, options) for _ in range(options.rounds)]
    finally:
        service.terminate()
        service.wait(30)
    whole, engine = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    print(f"context {options.context}: HTTP step {whole:.2f} ms, engine step {engine:.2f} ms, ratio {ratio:.2f}")
    print(
        json.dumps(
            {
                "benchmark": "http_step",
                "context": options.context,
                "http_ms": whole,
                "engine_ms": engine,
                "ratio": ratio,
            }
        )
    )


def measure(client: Client, port: int, options: argparse.Namespace) -> tuple[float, float]:
    """(median ms of a whole request, median of the engine's own step in them)."""
    with client.sessions.create(options.model) as session:
        session.prefill(token_ids=[list(range(100, 100 + options.context))])
        body = b'{"token_ids":[[7]],"sample":{"temperature":0}}'
        request = (
            f"POST /v1/sessions/{session.id}/step HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        whole, engine = [], []
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(options.steps):
                started = time.perf_counter()
                connection.sendall(request)
                reply = read_reply(connection)
                whole.append((time.perf_counter() - started) * 1e3)
                engine.append(reply["timings"]["compute_ms"])
    return statistics.median(whole), statistics.median(engine)


def read_reply(connection: socket.socket) -> dict[str, dict[str, float]]:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), data
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += connection.recv(65536)
    reply: dict[str, dict[str, float]] = json.loads(body)
    return reply


def start_service(port: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "KEYPAST_PORT": str(port), "KEYPAST_LOG_LEVEL": "warning"}
    return subprocess.Popen([sys.executable, "-m", "service"], env=environment, cwd=Path(__file__).parent.parent)


def wait_ready(client: Client, service: subprocess.Popen[bytes]) -> None:
    from keypast import ConnectFailed

    for _ in range(1200):
        if service.poll() is not None:
            raise SystemExit("the service ended")
        try:
            if client.ready():
                return
        except ConnectFailed:
            pass
        time.sleep(0.1)
    raise SystemExit("the service did not become ready in two minutes")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
