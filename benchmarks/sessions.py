"""What holding a session is worth: the next turn of a long conversation, and forks, against doing it again.

    turn        time to the first token of a 16-token turn on a history of 500 to 4,000 tokens
    fork        8 continuations of 32 tokens of one 2,000-token prompt

Ours over HTTP, against ourselves without the session (all of the history is prefilled again) and against llama.cpp's
server with its prompt cache, when its binary is given. Bound of a turn: the prefill of its own 16 tokens.

    python -m benchmarks.sessions [--llama-server PATH --weights DIR] [--rounds 5] [--save]
"""

import argparse
import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.compare import HEADER, Pairs, interleave, report
from benchmarks.peers.http import Connection
from benchmarks.peers.servers import Keypast, Llama, prompt

HISTORY, TURN, FORKS, CONTINUED = 2000, 16, 8, 32
GREEDY = {"sample": {"temperature": 0}}


class Held:
    """A conversation in a session; every measurement takes its turn back."""

    def __init__(self, server: Keypast, history: int) -> None:
        self._connection = Connection(server.port)
        self._history = history
        self._path = ""

    async def open(self) -> None:
        created = await self._connection.call("POST", "/v1/sessions", {"model": "model"})
        self._path = f"/v1/sessions/{created['id']}"
        await self._connection.call("POST", f"{self._path}/prefill", {"token_ids": [prompt(0, self._history)]})

    async def turn(self) -> float:
        """ms."""
        started = time.perf_counter()
        await self._connection.call("POST", f"{self._path}/prefill", {"token_ids": [prompt(1, TURN)], **GREEDY})
        elapsed = (time.perf_counter() - started) * 1e3
        await self._connection.call("POST", f"{self._path}/truncate", {"length": self._history})
        return elapsed

    async def forks(self) -> float:
        """ms until the last of all continuations is whole."""
        started = time.perf_counter()
        reply = await self._connection.call("POST", f"{self._path}/fork", {"count": FORKS})
        children = [child["id"] for child in reply["sessions"]]
        await asyncio.gather(*(self._continue(child) for child in children))
        elapsed = (time.perf_counter() - started) * 1e3
        for child in children:
            await self._connection.call("DELETE", f"/v1/sessions/{child}")
        return elapsed

    async def _continue(self, session: str) -> None:
        connection = Connection(self._connection.port)
        body = {"max_tokens": CONTINUED, "ignore_eos": True, "sample": {"temperature": 1.0}}
        await connection.call("POST", f"/v1/sessions/{session}/generate", body)
        await connection.close()

    async def close(self) -> None:
        await self._connection.call("DELETE", self._path)
        await self._connection.close()


async def again(server: Keypast, history: int) -> float:
    """ms of a turn when nothing was held."""
    return await server.prefill(prompt(0, history) + prompt(1, TURN)) * 1e3


async def llama_turn(server: Llama, history: int) -> float:
    """ms of the same turn, the history in the slot's cache as an earlier request left it."""
    connection = Connection(server.port)
    common: dict[str, Any] = {"n_predict": 1, "temperature": 0, "cache_prompt": True, "id_slot": 0}
    await connection.call("POST", "/completion", {"prompt": prompt(0, history), **common})
    started = time.perf_counter()
    await connection.call("POST", "/completion", {"prompt": prompt(0, history) + prompt(1, TURN), **common})
    elapsed = (time.perf_counter() - started) * 1e3
    await connection.close()
    return elapsed


async def llama_forks(server: Llama) -> float:
    """ms: the prompt is cached in slot 0, then eight requests share it as far as the server can."""
    connection = Connection(server.port)
    history = prompt(0, HISTORY)
    await connection.call(
        "POST", "/completion", {"prompt": history, "n_predict": 1, "cache_prompt": True, "id_slot": 0}
    )
    await connection.close()

    async def one() -> None:
        own = Connection(server.port)
        body = {"prompt": history, "n_predict": CONTINUED, "cache_prompt": True, "ignore_eos": True, "temperature": 1.0}
        await own.call("POST", "/completion", body)
        await own.close()

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(FORKS)))
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    results: list[Pairs] = []
    print(HEADER)
    with asyncio.Runner() as runner, Keypast() as ours:
        runner.run(ours.ready("/readyz"))
        for history in (500, HISTORY, 4000):
            results += turns(runner, ours, history, options)
        if options.llama_server:
            results.append(forks(runner, ours, options))
    report("sessions", results, {}, options.save)


def turns(runner: asyncio.Runner, ours: Keypast, history: int, options: argparse.Namespace) -> list[Pairs]:
    held = Held(ours, history)
    runner.run(held.open())
    what = f"{TURN}-token turn after {history}, TTFT"
    pairs = Pairs(what, "prefilled again", "ms", "less", 20 if history == HISTORY else None)
    turn, repeat = (lambda: runner.run(held.turn())), (lambda: runner.run(again(ours, history)))
    results = [interleave(pairs, turn, repeat, options.rounds)]
    if options.llama_server:
        with Llama(options.llama_server, options.weights / "smollm2-BF16.gguf", 1, history + 100) as peer:
            runner.run(peer.ready("/health"))
            pairs = Pairs(what, f"{peer.name}, cached", "ms", "less", 1 if history == HISTORY else None)
            theirs = partial(_run, runner, partial(llama_turn, peer, history))
            results.append(interleave(pairs, turn, theirs, options.rounds))
    runner.run(held.close())
    return results


def forks(runner: asyncio.Runner, ours: Keypast, options: argparse.Namespace) -> Pairs:
    held = Held(ours, HISTORY)
    runner.run(held.open())
    with Llama(options.llama_server, options.weights / "smollm2-BF16.gguf", FORKS, HISTORY + 100) as peer:
        runner.run(peer.ready("/health"))
        pairs = Pairs(f"{FORKS} continuations of {HISTORY}, {CONTINUED} tokens", peer.name, "ms", "less", 3)
        theirs = partial(_run, runner, partial(llama_forks, peer))
        result = interleave(pairs, lambda: runner.run(held.forks()), theirs, options.rounds)
    runner.run(held.close())
    return result


def _run(runner: asyncio.Runner, act: Any) -> float:
    elapsed: float = runner.run(act())
    return elapsed


if __name__ == "__main__":
    main()
