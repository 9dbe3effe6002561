"""One step of the raw attention layer on a session, against the ways in which it is done without one, and many sessions
stepped together against one after another.

Ours is measured twice: the layer alone (project, write, attend over the blocks), as the peers are bare torch modules;
and a whole engine step (admit, schedule, run, commit). The peers, `peers/layer_worker.py`, run in a process of their
own with torch's defaults and as many threads; with --peer-huge-pages they are measured a second time in one whose
tensors lie in pages of 2 MB, as ours do ("2M"). Together and apart: the engine in process, and the service over HTTP,
one client, binary bodies, `POST /v1/batch/step` against a `step` a session. Bound: reading the past's keys and values
once.

    python -m benchmarks.raw_layer [--context 4096 16384] [--rounds 5] [--peer-huge-pages] [--save]
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.compare import HEADER, Pairs, interleave, median_ms, report
from benchmarks.peers.layer_worker import HEADS, HIDDEN, WAYS, LayerPeer
from benchmarks.peers.ours import run
from benchmarks.peers.servers import Keypast
from engine.attention.base import AttentionInputs
from engine.attention.view import PagedView
from engine.batch import Append
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_pool import KVPool
from engine.loading import LoadOptions, load_model
from keypast import Client
from keypast.batch import read_outcomes, write_steps
from keypast.loadtest.connection import Address, Connection
from keypast.schemas import BatchStep
from keypast.wire import SAFETENSORS_TYPE, dump_tensors

LAYER = f"attention:hidden={HIDDEN},heads={HEADS}"
TOGETHER, THEIR_CONTEXT, CHUNK = 32, 1024, 512  # sessions, their length, positions appended at once
GOALS = {
    (4096, "recompute"): 1000,
    (4096, "cat"): 12,
    (4096, "in place"): 10,
    (4096, "masked"): 18,
    (16384, "masked"): 35,
}


class Ours:
    def __init__(self, cache: Path) -> None:
        loaded = load_model("layer", LAYER, LoadOptions(cache, kv_memory=4 << 30), lambda message: None)
        self.runner = loaded.runner
        self.engine = Engine([loaded.runner], EngineConfig())

    def layer(self, context: int) -> Callable[[], object]:
        """A step of the layer alone, its tensors at hand, on a past of `context` positions in blocks of its own."""
        spec, size = self.runner.spec, EngineConfig().block_size
        width = context // size + 1
        pool = KVPool(spec.kv, width + 1, size, "cpu")
        table = torch.arange(width, 0, -1, dtype=torch.int32)
        for stored in (pool.k, pool.v):
            stored.copy_(torch.randn(stored.shape))
        inputs = AttentionInputs(
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            past_length=torch.tensor([context], dtype=torch.int32),
            present_length=torch.tensor([context + 1], dtype=torch.int32),
            block_table=table[None],
            positions=torch.tensor([context]),
            slots=torch.tensor([int(table[-1]) * size + context % size]),
            causal=False,
            steps=True,
        )
        view = PagedView(pool, inputs, self.runner.backend)
        given = {name: torch.ones(1, HIDDEN, dtype=torch.bfloat16) for name in ("query", "key", "value")}
        return partial(self.runner.model.forward, given, view)

    def session(self, context: int) -> str:
        """With a past of `context` positions, appended in parts whose masks are small."""
        session = self.engine.create_session("layer").id
        for chunk in past(context):
            run(self.engine, [Append(session, chunk)])
        return session

    def step(self, sessions: list[str]) -> None:
        run(self.engine, [Append(session, ones(1, np.float32), step=True) for session in sessions])


class Service:
    """The same over HTTP: one connection, bodies made beforehand, replies read and not parsed."""

    def __init__(self, port: int, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._connection = Connection(Address(f"http://127.0.0.1:{port}"), {"Content-Type": SAFETENSORS_TYPE})
        with Client(f"http://127.0.0.1:{port}") as client:
            sessions = [client.sessions.create("layer") for _ in range(TOGETHER)]
            for session in sessions:
                for chunk in past(THEIR_CONTEXT):
                    session.prefill(**chunk)  # type: ignore[arg-type]
        one = ones(1, np.float16)
        self._single = dump_tensors(one, {})
        self._paths = [f"/v1/sessions/{session.id}/step" for session in sessions]
        self._all = write_steps([(BatchStep(session_id=session.id), one) for session in sessions], binary=True).body

    def together(self, repeats: int) -> float:
        """Median ms of a step of all."""
        reply, ms = self._runner.run(self._posted([("/v1/batch/step", self._all)] * repeats))
        told = [outcome.told.status for outcome in read_outcomes(SAFETENSORS_TYPE, reply)]
        assert told == [200] * TOGETHER, told
        return statistics.median(ms)

    def apart(self, repeats: int) -> float:
        """The same of one after another."""
        _, ms = self._runner.run(self._posted([(path, self._single) for path in self._paths] * repeats))
        rounds = [sum(ms[at : at + TOGETHER]) for at in range(0, len(ms), TOGETHER)]
        return statistics.median(rounds)

    async def _posted(self, posts: list[tuple[str, bytes]]) -> tuple[bytes, list[float]]:
        """The last reply, and the ms of each."""
        body, ms = b"", []
        for path, sent in posts:
            started = time.perf_counter()
            reply = await self._connection.request("POST", path, sent)
            ms.append((time.perf_counter() - started) * 1e3)
            assert reply.status == 200, reply
            body = reply.body
        return body, ms


def ones(n: int, dtype: type) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.ones((1, n, HIDDEN), dtype) for name in ("query", "key", "value")}


def past(context: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Appends that make it, in parts whose masks are small."""
    parts = [(start, min(CHUNK, context - start)) for start in range(0, context, CHUNK)]
    masks = [np.tri(n, start + n, start, dtype=np.uint8)[None] for start, n in parts]
    return [ones(mask.shape[1], np.float16) | {"attention_mask": mask} for mask in masks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-huge-pages", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "keypast")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    ours = Ours(options.cache)
    print(HEADER)
    results = []
    with torch.inference_mode(), ExitStack() as stack:
        threads = torch.get_num_threads()
        peers = {"": stack.enter_context(LayerPeer(threads, huge_pages=False))}
        if options.peer_huge_pages:
            peers[" 2M"] = stack.enter_context(LayerPeer(threads, huge_pages=True))
        for context in options.context:
            results += steps(ours, peers, context, options.rounds)
    results += together(ours, options.rounds)
    report("raw_layer", results, {}, options.save)


def steps(ours: Ours, peers: Mapping[str, LayerPeer], context: int, rounds: int) -> list[Pairs]:
    session = ours.session(context)
    sides: dict[str, Callable[[], object]] = {"layer": ours.layer(context), "engine": partial(ours.step, [session])}
    results = []
    for dtype in ("bfloat16", "float32"):
        for peer in peers.values():
            peer.begin(dtype, context)
        for side, step in sides.items():
            for way in WAYS:
                if way == "recompute" and (context > 4096 or side == "layer"):
                    continue  # minutes a call
                for pages, peer in peers.items():
                    pairs = Pairs(
                        f"{side} step at {context}", f"{way} {dtype}{pages}", "ms", "less", GOALS.get((context, way))
                    )
                    theirs = partial(peer.step_ms, way, 1 if way == "recompute" else 20)
                    results.append(interleave(pairs, partial(median_ms, step, 20), theirs, rounds))
    ours.engine.delete_session(session)
    return results


def together(ours: Ours, rounds: int) -> list[Pairs]:
    """In process and over HTTP."""
    what = f"{TOGETHER} sessions at {THEIR_CONTEXT}"
    ids = [ours.session(THEIR_CONTEXT) for _ in range(TOGETHER)]

    def apart() -> None:
        for session in ids:
            ours.step([session])

    pairs = Pairs(f"{what}, in process", "one after another", "ms", "less", 4)
    all_at_once = partial(median_ms, lambda: ours.step(ids), 10)
    results = [interleave(pairs, all_at_once, partial(median_ms, apart, 3), rounds)]
    for session in ids:
        ours.engine.delete_session(session)
    with asyncio.Runner() as runner, Keypast(models=f"layer={LAYER}") as server:
        runner.run(server.ready("/readyz"))
        service = Service(server.port, runner)
        pairs = Pairs(f"{what}, over HTTP", "one after another", "ms", "less", 4)
        results.append(interleave(pairs, partial(service.together, 10), partial(service.apart, 3), rounds))
    return results


if __name__ == "__main__":
    main()
