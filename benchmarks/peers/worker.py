"""A peer in a process of its own: a JSON request a line in, a JSON reply a line out; other lines are passed over."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Self

from benchmarks.peers.servers import ROOT

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_OURS = (HUGE_PAGES, "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY")


class Worker:
    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next reply."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        raise SystemExit("the peer's process ended")


class TorchWorker(Worker):
    """A module that calls `serve`, in torch as a user has it: what the service sets for itself is not set. With
    `huge_pages` its tensors lie in pages of 2 MB, as ours do."""

    def __init__(self, module: str, threads: int, *, huge_pages: bool) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _OURS}
        environment["OMP_NUM_THREADS"] = str(threads)
        if huge_pages:
            environment[HUGE_PAGES] = "1"
        super().__init__([sys.executable, "-m", module], environment)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
