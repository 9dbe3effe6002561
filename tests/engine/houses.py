"""An engine over a fake decoder, a clock that is told the time, and short ways to talk to both."""

from collections.abc import Callable
from typing import Any

import numpy as np

from engine.batch import Append, Want
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from tests.fakes import DECODER, FakeClock, FakeRunner


class Decoders:
    """Sessions of one row; blocks of 4 positions. Checks the engine after every turn."""

    def __init__(self, blocks: int = 24, **config: Any) -> None:
        self.runner = FakeRunner(DECODER, blocks=blocks + 1, block_size=4)
        self.clock = FakeClock()
        settings = {"block_size": 4, "token_budget": 8, "wait_seconds": 5.0, **config}
        self.engine = Engine([self.runner], EngineConfig(**settings), self.clock)

    def open(self, tenant: str = "", positions: int = 0, **options: Any) -> str:
        session_id = self.engine.create_session("decoder", tenant=tenant, **options).id
        if positions:
            self.append(session_id, positions, tenant)
        return session_id

    def submit(self, session_id: str, positions: int, tenant: str = "", **options: Any) -> Append:
        tokens = np.arange(positions, dtype=np.int64)[None] % 90
        append = Append(session_id, {"token_ids": tokens}, tenant, want=Want(), **options)
        self.engine.submit(append)
        return append

    def append(self, session_id: str, positions: int, tenant: str = "") -> Any:
        append = self.submit(session_id, positions, tenant)
        self.run()
        return append.future.result(0)

    def run(self) -> None:
        while self.engine.run_once():
            self.check()

    def check(self) -> None:
        self.engine.check()
        assert self.runner.faults == []

    def later(self, seconds: float) -> None:
        self.clock.now += seconds

    def free(self) -> int:
        return self.engine.capacity().models[0].free


def refusal(call: Callable[[], object]) -> EngineError | None:
    """What it raises of the engine's tree."""
    try:
        call()
    except EngineError as error:
        return error
    return None
