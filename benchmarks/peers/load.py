"""The same requests again and again over keep-alive connections: wrk where it is installed, else a client in Python."""

import asyncio
import itertools
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from keypast.loadtest.connection import Address, Connection

WRK = shutil.which("wrk")
CLIENT = "wrk" if WRK else "python"

SCRIPT = """
local requests, at = {{}}, 0
function init(args)
  for index = 0, {last} do
    local path = assert(io.open("{directory}/" .. index .. ".path"))
    local body = assert(io.open("{directory}/" .. index, "rb"))
    requests[index] = wrk.format("POST", path:read("*a"), {{{headers}}}, body:read("*a"))
  end
end
function request()
  at = (at + 1) % ({last} + 1)
  return requests[at]
end
"""


@dataclass
class Requests:
    """What is posted: paths and bodies, in turn, whatever connection is free."""

    port: int
    posts: Sequence[tuple[str, bytes]]
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/octet-stream"})

    def a_second(self, connections: int, seconds: float) -> float:
        """Replies a second. Raises RuntimeError where one is not a success."""
        if WRK:
            return self._by_wrk(connections, seconds)
        return asyncio.run(self._by_python(connections, seconds))

    def _by_wrk(self, connections: int, seconds: float) -> float:
        with tempfile.TemporaryDirectory() as directory:
            for index, (path, body) in enumerate(self.posts):
                (Path(directory) / f"{index}.path").write_text(path)
                (Path(directory) / str(index)).write_bytes(body)
            script = Path(directory) / "requests.lua"
            headers = ", ".join(f'["{name}"] = "{value}"' for name, value in self.headers.items())
            script.write_text(SCRIPT.format(directory=directory, headers=headers, last=len(self.posts) - 1))
            command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", str(script)]
            told = subprocess.run(
                [*command, f"http://127.0.0.1:{self.port}"], capture_output=True, text=True, check=True
            ).stdout
        rate = re.search(r"Requests/sec:\s*([\d.]+)", told)
        if rate is None or "Non-2xx" in told or "Socket errors" in told:
            raise RuntimeError(told)
        return float(rate[1])

    async def once(self) -> None:
        """Every post, one after the other. Raises RuntimeError where one is refused."""
        connection = self._connection()
        for path, body in self.posts:
            await self._post(connection, path, body)
        await connection.close()

    async def _by_python(self, connections: int, seconds: float) -> float:
        started, posts = time.perf_counter(), itertools.cycle(self.posts)

        async def drive() -> int:
            connection, done = self._connection(), 0
            while time.perf_counter() < started + seconds:
                await self._post(connection, *next(posts))
                done += 1
            await connection.close()
            return done

        done = sum(await asyncio.gather(*(drive() for _ in range(connections))))
        return done / (time.perf_counter() - started)

    def _connection(self) -> Connection:
        return Connection(Address(f"http://127.0.0.1:{self.port}"), self.headers)

    async def _post(self, connection: Connection, path: str, body: bytes) -> None:
        reply = await connection.request("POST", path, body)
        if reply.status != 200:
            raise RuntimeError(f"POST {path}: {reply.status} {reply.body[:1000]!r}")
