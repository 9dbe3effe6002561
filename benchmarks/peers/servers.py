"""Servers of the same model behind one face: how long a prompt takes, how fast streams decode.

`weights` are the same numbers everywhere; prompts are random tokens drawn from the same seed. Every server runs as its
own process, with as many threads as there are cores, and lies idle while another is measured.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from benchmarks.peers.http import Connection

ROOT = Path(__file__).parent.parent.parent
CORES = os.cpu_count() or 1


class Server(Protocol):
    name: str

    async def prefill(self, prompt: list[int]) -> float:
        """Seconds from the request to the first token after a prompt that nothing is known of."""
        ...

    async def streams(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        """Every prompt is read first; then all are decoded at once. (tokens a second while all decode, ms from the
        start of decoding to the last token of the last stream)."""
        ...


def prompt(seed: int, length: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(100, 40_000, length).tolist()
    return drawn


def rate(arrivals: list[list[float]]) -> float:
    """Tokens a second between the last stream's first token and the first stream's last."""
    start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    return sum(start < at <= end for times in arrivals for at in times) / (end - start)


class Process:
    """A server's process; ended with the block."""

    def __init__(self, command: list[str], environment: dict[str, str], port: int) -> None:
        self.port = port
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it started and left behind would disturb what follows

    async def ready(self, path: str) -> None:
        for _ in range(3000):
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended with {self._process.returncode}")
            try:
                await Connection(self.port).call("GET", path)
                return
            except (OSError, RuntimeError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.1)
        raise SystemExit("the server did not become ready in five minutes")


class Trivial(Process):
    """One of the applications of `peers.trivial`, by uvicorn."""

    def __init__(self, app: str) -> None:
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", f"benchmarks.peers.trivial:{app}", "--port", str(port)]
        super().__init__([*command, "--no-access-log"], {}, port)


class Keypast(Process):
    def __init__(self, model: str = "default", **settings: str) -> None:
        port = free_port()
        settings = {"models": f"model={model}", "log_level": "warning"} | settings
        environment = {f"KEYPAST_{key.upper()}": value for key, value in settings.items()}
        super().__init__([sys.executable, "-m", "service"], {**environment, "KEYPAST_PORT": str(port)}, port)
        self.name = "keypast"

    async def prefill(self, prompt: list[int]) -> float:
        connection = Connection(self.port)
        session = await self._open(connection)
        started = time.perf_counter()
        await connection.call("POST", f"{session}/prefill", {"token_ids": [prompt], "sample": {"temperature": 0}})
        elapsed = time.perf_counter() - started
        await connection.call("DELETE", session)
        await connection.close()
        return elapsed

    async def streams(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        connection = Connection(self.port)
        sessions = []
        for prompt in prompts:
            sessions.append(await self._open(connection))
            await connection.call("POST", f"{sessions[-1]}/prefill", {"token_ids": [prompt]})
        body = {"max_tokens": tokens, "stream": True, "ignore_eos": True}
        started = time.perf_counter()
        arrivals = await asyncio.gather(*(_arrivals(self.port, f"{session}/generate", body) for session in sessions))
        ended = max(times[-1] for times in arrivals)
        for session in sessions:
            await connection.call("DELETE", session)
        await connection.close()
        return rate(arrivals), (ended - started) * 1e3

    async def _open(self, connection: Connection) -> str:
        session = await connection.call("POST", "/v1/sessions", {"model": "model"})
        return f"/v1/sessions/{session['id']}"


class Llama(Process):
    """llama.cpp's server: one slot a stream, its prompt cache on, flash attention on, as its documentation advises."""

    def __init__(self, binary: Path, weights: Path, slots: int, context: int, threads: int = CORES) -> None:
        port = free_port()
        command = [str(binary), "-m", str(weights), "--port", str(port), "-t", str(threads), "-tb", str(threads)]
        command += ["-np", str(slots), "-c", str(slots * context), "-fa", "on", "--no-webui"]
        command += ["--no-kv-unified"]  # a stream's attention reads its own past only
        super().__init__(command, {}, port)
        self.name = f"llama.cpp {weights.stem.rpartition('-')[2]}"

    async def prefill(self, prompt: list[int]) -> float:
        connection = Connection(self.port)
        started = time.perf_counter()
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "cache_prompt": False, "id_slot": 0}
        await connection.call("POST", "/completion", body)
        elapsed = time.perf_counter() - started
        await connection.close()
        return elapsed

    async def streams(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        connection = Connection(self.port)
        common: dict[str, Any] = {"temperature": 0, "cache_prompt": True, "ignore_eos": True}
        for slot, prompt in enumerate(prompts):
            await connection.call("POST", "/completion", {"prompt": prompt, "n_predict": 1, "id_slot": slot, **common})
        await connection.close()
        started = time.perf_counter()
        bodies = [
            {"prompt": prompt, "n_predict": tokens, "id_slot": slot, "stream": True, **common}
            for slot, prompt in enumerate(prompts)
        ]
        arrivals = await asyncio.gather(*(_arrivals(self.port, "/completion", body) for body in bodies))
        return rate(arrivals), (max(times[-1] for times in arrivals) - started) * 1e3


async def _arrivals(port: int, path: str, body: dict[str, Any]) -> list[float]:
    """When each token of a stream came."""
    connection = Connection(port)
    times = [
        at async for at, event in connection.events(path, body) if event.get("token_ids") or event.get("stop") is False
    ]
    await connection.close()
    return times


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
