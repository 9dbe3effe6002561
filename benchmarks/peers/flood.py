"""A tenant that does what it can: `python -m benchmarks.peers.flood PORT KEY LONGEST` until it is terminated.

63 connections, each with up to four sessions: appends of up to LONGEST positions, steps, deletes; what is refused is
asked again at once. It runs at the lowest priority, as clients on other machines would take nothing from the server.
"""

import asyncio
import os
import random
import sys
from contextlib import suppress

from benchmarks.peers.http import Connection
from benchmarks.peers.servers import prompt

CONNECTIONS = 63
STEP = {"token_ids": [[7]], "sample": {"temperature": 0}}


async def flood(connection: Connection, seed: int, tokens: list[int]) -> None:
    """One connection's share; `tokens` is the longest append."""
    drawn = random.Random(seed)
    paths: list[str] = []
    while True:
        if len(paths) < 4:
            created = await connection.call("POST", "/v1/sessions", {"model": "model"})
            paths.append(f"/v1/sessions/{created['id']}")
        path = drawn.choice(paths)
        with suppress(RuntimeError):  # refused: 429, 409 of a step on an empty session, 422 of one that is full
            await connection.call("POST", f"{path}/prefill", {"token_ids": [tokens[: drawn.randint(1, len(tokens))]]})
        for _ in range(8):
            with suppress(RuntimeError):
                await connection.call("POST", f"{path}/step", STEP)
        if drawn.random() < 0.3:
            paths.remove(path)
            await connection.call("DELETE", path)


async def main() -> None:
    port, key, longest = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.nice(19)
    tokens, headers = prompt(0, longest), {"Authorization": f"Bearer {key}"}
    await asyncio.gather(*(flood(Connection(port, headers), seed, tokens) for seed in range(CONNECTIONS)))


if __name__ == "__main__":
    asyncio.run(main())
