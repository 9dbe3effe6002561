"""Our engine over one decoder, in process, for comparisons with what has no server."""

import os
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.peers.servers import prompt
from engine.batch import Append, Sample, Want
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import LoadOptions, load_model

STEPS = 40

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the service does, before the first large tensor


def run(engine: Engine, appends: list[Append]) -> None:
    """All of them, to the end. Raises what one of them ended with."""
    for append in appends:
        engine.submit(append)
    while engine.run_once():
        pass
    for append in appends:
        append.future.result(0)


class OurEngine:
    def __init__(
        self, model: str = "default", dtype: str = "auto", kv_memory: int = 3 << 30, config: EngineConfig | None = None
    ) -> None:
        cache = Path.home() / ".cache" / "keypast"
        loaded = load_model("model", model, LoadOptions(cache, kv_memory=kv_memory, dtype=dtype), lambda message: None)
        self.engine = Engine([loaded.runner], config or EngineConfig())

    def step_ms(self, sessions: int, context: int) -> float:
        """Median of greedy steps of all sessions in one batch."""
        ids = [self.session(prompt(seed, context)) for seed in range(sessions)]
        times = [self.step(ids) for _ in range(STEPS)]
        self.delete(ids)
        return statistics.median(times)

    def prefill(self, length: int) -> float:
        """Positions a second to the first token, median of three prompts."""
        seconds = []
        for seed in range(3):
            session = self.engine.create_session("model").id
            started = time.perf_counter()
            run(
                self.engine,
                [Append(session, {"token_ids": np.array([prompt(seed, length)])}, want=Want(sample=Sample()))],
            )
            seconds.append(time.perf_counter() - started)
            self.delete([session])
        return length / statistics.median(seconds)

    def session(self, tokens: list[int]) -> str:
        session = self.engine.create_session("model").id
        run(self.engine, [Append(session, {"token_ids": np.array([tokens])})])
        return session

    def step(self, sessions: list[str]) -> float:
        """ms."""
        started = time.perf_counter()
        want = Want(sample=Sample())
        run(
            self.engine, [Append(session, {"token_ids": np.array([[7]])}, step=True, want=want) for session in sessions]
        )
        return (time.perf_counter() - started) * 1e3

    def delete(self, sessions: list[str]) -> None:
        for session in sessions:
            self.engine.delete_session(session)
