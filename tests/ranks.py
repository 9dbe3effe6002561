"""Real processes over torch.distributed's gloo, kept for many tests: starting one takes seconds."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist


class RankFailed(Exception):
    """What a rank raised, as text: not every exception travels."""


class World:
    """`size` processes, each a rank of one world."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.size = size
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, rank, size, str(folder / "store")), daemon=True)
            process.start()
            other.close()
            self._pipes.append(own)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` gives on each rank. Raises RankFailed if it raises on any."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self._pipes:
            assert pipe.poll(60), "a rank hangs"
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, RankFailed):
                raise answer
        return answers


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=30)
    rendezvous = dist.FileStore(store, size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = RankFailed(f"{type(error).__name__}: {error}")
        pipe.send(answer)
