"""A model cut over processes. This process is rank 0: it decides, and computes its share; the others compute theirs.

    rank 0                                      ranks 1 to N - 1
    plan: arrays, block ids    -- pipe ->       the same plan
    execute                    <- sums ->       execute
    outputs of every row       <- pipe --       done, or what failed

A pass that fails on every rank alike (a bad batch) is that batch's failure. Anything else ends the team, because what
the ranks hold may not be alike any more: a rank that ended, one that failed alone, one that kept the others waiting.
"""

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.batch import Array
from engine.errors import InvalidInput, RanksLost
from engine.loading import LoadedModel, LoadOptions, load_model
from engine.parallel import CollectiveFailed, Parallel
from engine.runner import ModelRunner, Plan

START_SECONDS = 300.0  # for a process to import what it needs
LOAD_SECONDS = 3600.0
GRACE_SECONDS = 5.0  # between the failures of ranks that fail alike; for a rank to end when it is told to


class Team:
    """The processes of ranks 1 to N - 1, N at least 2; a process has one team at a time. `seconds`: how long one rank
    may keep the others waiting.

    Raises InvalidInput where there are fewer GPUs than ranks, RanksLost when a process does not come up.
    """

    def __init__(self, ranks: int, device: str = "cpu", seconds: float = 60.0) -> None:
        if device == "cuda" and torch.cuda.device_count() < ranks:
            have = f"{ranks} ranks need as many GPUs, and torch sees {torch.cuda.device_count()}"
            raise InvalidInput("model_parallel", f"{have}; lower it, or choose the device cpu")
        self._seconds = seconds
        self._running = threading.Lock()
        self._closed = False
        self._closing = threading.Lock()
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        # Where the ranks find each other: a file, because a TCP store listens on every interface.
        self._folder = tempfile.TemporaryDirectory(prefix="keypast-ranks-")
        store = str(Path(self._folder.name) / "store")
        atexit.register(self.close)
        try:
            for rank in range(1, ranks):
                self._start(rank, (rank, ranks, store, device, seconds))
            self._collect(START_SECONDS)
            self.parallel = _join(0, ranks, store, device, seconds)
        except BaseException:
            self.close()
            raise

    def load(self, name: str, spec: str, options: LoadOptions, progress: Callable[[str], None]) -> LoadedModel:
        """Here first, so that one process alone fetches and converts; then the others read their shares.

        Raises what load_model raises, and RanksLost.
        """
        own = dataclasses.replace(options, parallel=self.parallel, together=partial(self.together, name))
        loaded = load_model(name, spec, own, progress)
        progress(f"{name}: loading on the other ranks")
        # What there is to warn of has been said.
        others = dataclasses.replace(options, warn=_say_nothing)
        with self.together(name, "load", spec, others, seconds=LOAD_SECONDS) as shares:
            pass
        if any(share != (loaded.runner.spec.fingerprint, loaded.runner.blocks) for share in shares):
            raise InvalidInput("model", f"{name} has changed while it was loaded; start again")
        return loaded

    def watch(self, tell: Callable[[RanksLost], object]) -> None:
        """`tell` is called once, on a thread of its own, when a process ends unasked, also while nothing runs."""

        def watch() -> None:
            wait([process.sentinel for process in self._processes])
            if not self._closed:
                tell(RanksLost(self._ended()))

        threading.Thread(target=watch, name="ranks", daemon=True).start()

    @contextlib.contextmanager
    def together(self, name: str, method: str, *arguments: object, seconds: float | None = None) -> Iterator[list[Any]]:
        """The other ranks run a `method` of _Rank while the body does the same here; then the list has their answers.

        Raises what the body raised if every rank failed, RanksLost if only some did, or if one is not there.
        """
        with self._running:
            answers: list[Any] = []
            failure: Exception | None = None
            self._send((name, method, arguments))
            try:
                yield answers
            except CollectiveFailed as error:
                raise self._lost(str(error)) from error
            except Exception as error:
                failure = error
            except BaseException:
                self.close()  # nobody knows how far the others are
                raise
            replies = self._collect(GRACE_SECONDS if failure is not None else seconds or self._seconds)
            errors = [error for error, _ in replies if error is not None]
            if failure is not None and len(errors) == len(replies):
                raise failure
            if failure is not None or errors:
                raise self._lost(f"a rank failed alone: {errors[0] if errors else repr(failure)}") from failure
            answers.extend(answer for _, answer in replies)

    def close(self) -> None:
        """Ends the processes, which have a moment to go by themselves. Any thread may, any number of times."""
        with self._closing:
            closed, self._closed = self._closed, True
        if closed:
            return
        atexit.unregister(self.close)
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()

    def _start(self, rank: int, arguments: tuple[object, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        own, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, *arguments), name=f"rank-{rank}", daemon=True)
        process.start()
        other.close()
        with socket.socket(
            fileno=os.dup(own.fileno())
        ) as end:  # a rank that stops amid a message does not stop this one
            for way in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                end.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", int(self._seconds) + 1, 0))
        self._processes.append(process)
        self._pipes.append(own)

    def _send(self, message: object) -> None:
        """Raises RanksLost."""
        data = ForkingPickler.dumps(message)
        for pipe in self._pipes:
            try:
                pipe.send_bytes(data)
            except OSError as error:
                raise self._lost("a rank does not read") from error

    def _collect(self, seconds: float) -> list[tuple[str | None, Any]]:
        """(what failed, the answer) of each rank. Raises RanksLost."""
        deadline = time.monotonic() + seconds
        replies = []
        for rank, pipe in enumerate(self._pipes, 1):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise self._lost(f"rank {rank} kept the others waiting for {seconds:g} s")
                replies.append(pipe.recv())
            except (OSError, EOFError) as error:
                raise self._lost(f"rank {rank} is gone") from error
        return replies

    def _lost(self, reason: str) -> RanksLost:
        """The team is over; that a process has ended is a better reason than what was seen of it."""
        error = RanksLost(self._ended() or reason)
        for process in self._processes:
            process.kill()
        self.close()
        return error

    def _ended(self) -> str:
        gone = wait([process.sentinel for process in self._processes], timeout=1)  # it shows after its pipe's end
        ended = [process for process in self._processes if process.sentinel in gone]
        with self._closing:  # two threads that wait for one process: the later one learns no exit code
            for process in ended:
                process.join(1)
            return ", ".join(f"{process.name} has ended (exit code {process.exitcode})" for process in ended)


class _Rank:
    """What rank 0 asks of the others."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._runners: dict[str, ModelRunner] = {}

    def load(self, name: str, spec: str, options: LoadOptions) -> tuple[str, int]:
        options = dataclasses.replace(options, parallel=self._parallel)
        runner = self._runners[name] = load_model(name, spec, options, _say_nothing).runner
        return runner.spec.fingerprint, runner.blocks

    def execute(self, name: str, plan: Plan) -> None:
        self._runners[name].execute(plan)

    def read_past(self, name: str, *arguments: Any) -> dict[str, Array]:  # noqa: ANN401
        return self._runners[name].read_past(*arguments)

    def zero(self, name: str, blocks: list[int]) -> None:
        self._runners[name].zero(blocks)

    def write_past(self, name: str, *arguments: Any) -> None:  # noqa: ANN401
        self._runners[name].write_past(*arguments)


def _serve(pipe: Connection, rank: int, ranks: int, store: str, device: str, seconds: float) -> None:
    """A rank's process, until it is told to end, rank 0 is gone, or the ranks are not together any more. It leaves
    without what torch.distributed would still wait for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a drain needs every rank: rank 0 says when it is over
    leave = partial(_leave, Path(store).parent)
    _end_with_parent(leave)
    pipe.send((None, None))
    try:
        own = _Rank(_join(rank, ranks, store, device, seconds))
        while (message := pipe.recv()) is not None:
            name, method, arguments = message
            reply: tuple[str | None, Any]
            try:
                reply = None, getattr(own, method)(name, *arguments)
            except CollectiveFailed:
                raise
            except Exception as error:
                reply = f"{type(error).__name__}: {error}", None
            pipe.send(reply)
    except (EOFError, OSError, CollectiveFailed, RanksLost):
        leave()
    os._exit(0)


def _leave(folder: Path) -> None:
    """However rank 0 ends, no process of the team and no file stays."""
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _end_with_parent(leave: Callable[[], None]) -> None:
    """Also while a pass runs, or never ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        wait([parent.sentinel])
        leave()

    threading.Thread(target=end, name="parent", daemon=True).start()


def _join(rank: int, ranks: int, store: str, device: str, seconds: float) -> Parallel:
    """Raises RanksLost."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.FileStore(store, ranks),  # type: ignore[attr-defined]
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=seconds),
            device_id=torch.device("cuda", rank) if device == "cuda" else None,  # they connect now, not in a pass
        )
        return Parallel.grid(1, ranks, device)
    except RuntimeError as error:
        raise RanksLost(f"the ranks do not find each other: {error}") from error


def _say_nothing(text: str) -> None:
    pass
