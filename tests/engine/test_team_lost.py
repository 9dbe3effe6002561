"""What becomes of a team whose other process does not do its part. The test's own process is rank 0."""

import multiprocessing
import os
import signal
import time
from queue import Queue

import pytest

from engine.batch import Append
from engine.errors import RanksLost
from engine.loading import LoadOptions
from engine.team import Team
from tests.engine.models import CACHE, Served
from tests.engine.test_attention_model import causal, tensors
from tests.pace import slow_but

LAYER = "attention:hidden=24,heads=4"
OPTIONS = LoadOptions(CACHE, kv_memory=8 << 20, dtype="float32", kv_dtype="float32")


@pytest.mark.parametrize("end", slow_but([signal.SIGKILL, signal.SIGSTOP], {signal.SIGKILL}), ids=["killed", "stopped"])
def test_a_rank_that_is_gone_or_hangs_ends_the_engine(end: signal.Signals) -> None:
    before = multiprocessing.active_children()
    team = Team(2, seconds=2)
    try:
        (rank,) = [process for process in multiprocessing.active_children() if process not in before]
        assert rank.pid is not None
        runner = team.load("layer", LAYER, OPTIONS, print).runner
        told: Queue[RanksLost] = Queue()
        team.watch(told.put)
        served = Served(runner)
        append = Append(served.open(), {**tensors(1, 4), "attention_mask": causal(1, 4)})
        served.engine.submit(append)
        os.kill(rank.pid, end)
        started = time.monotonic()
        with pytest.raises(RanksLost, match="rank"):
            served.engine.run_once()
        assert time.monotonic() - started < 10
        served.engine.abort(RuntimeError("down"))
        assert isinstance(append.future.exception(0), RuntimeError)
        served.engine.check()
        assert not rank.is_alive()
        with pytest.raises(RanksLost), team.together("layer", "execute"):
            pass
    finally:
        team.close()


def test_a_rank_that_dies_while_nothing_runs_is_told_of() -> None:
    before = multiprocessing.active_children()
    team = Team(2)
    try:
        told: Queue[RanksLost] = Queue()
        team.watch(told.put)
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()
        assert str(told.get(timeout=10)) == "rank-1 has ended (exit code -9)"
    finally:
        team.close()
