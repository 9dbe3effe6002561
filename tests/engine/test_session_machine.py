"""Random lives of many sessions against a plain model in memory: a dict of lists."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from engine.batch import Append, Generate, Sample, Truncate, Want
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import LengthExceeded, ModelFailed, PoolExhausted, SessionGone
from tests.fakes import DECODER, VOCAB, FakeClock, FakeRunner, next_token

POISON = VOCAB - 1
BLOCKS = 24
tokens = st.integers(0, POISON - 1)
picks = st.integers(0, 10**6)


@dataclass
class Told:
    """What a session must hold."""

    rows: list[list[int]]
    version: int = 0
    waiting: list[Append] = field(default_factory=list)


class Sessions(RuleBasedStateMachine):
    sessions: Bundle[str] = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.runner = FakeRunner(DECODER, blocks=BLOCKS, block_size=4)
        self.clock = FakeClock()
        config = EngineConfig(block_size=4, token_budget=8, wait_seconds=5)
        self.engine = Engine([self.runner], config, self.clock)
        self.told: dict[str, Told] = {}

    def settle(self) -> None:
        """Runs until nothing moves, then past every deadline."""
        while self.engine.run_once():
            self.engine.check()
        self.clock.now += 6
        while self.engine.run_once():
            self.engine.check()

    @rule(target=sessions, rows=st.integers(1, 3), max_length=st.integers(1, 60))
    def create(self, rows: int, max_length: int) -> str:
        session = self.engine.create_session("decoder", batch_size=rows, max_length=max_length).id
        self.told[session] = Told([[] for _ in range(rows)])
        return session

    @rule(session=sessions, data=st.data())
    def append(self, session: str, data: st.DataObject) -> None:
        told = self.told[session]
        n = data.draw(st.integers(1, 21))
        rows = [data.draw(st.lists(tokens, min_size=n, max_size=n)) for _ in told.rows]
        counts = [data.draw(st.integers(0, n)) for _ in told.rows]
        if not any(counts):
            counts[0] = n
        fails = data.draw(st.integers(0, 9)) == 0
        if fails:
            rows[counts.index(max(counts))][max(counts) - 1] = POISON
        after = [row + new[:count] for row, new, count in zip(told.rows, rows, counts, strict=True)]
        lengths = [len(row) for row in after]
        append = Append(session, {"token_ids": np.array(rows)}, batch_valid_length=lengths, want=Want(sample=Sample()))
        self.runner.poison = POISON
        self.engine.submit(append)
        self.settle()
        error = append.future.exception(0)
        if max(lengths) > self.engine.session(session).max_length or sum(lengths) > (BLOCKS - 1) * 4:
            assert isinstance(error, LengthExceeded)
        elif error is not None:
            assert isinstance(error, ModelFailed if fails else PoolExhausted) or isinstance(error, PoolExhausted)
        else:
            assert not fails
            told.rows, told.version = after, told.version + 1
            result = append.future.result(0)
            expected = [next_token(row) if count else None for row, count in zip(after, counts, strict=True)]
            assert result.outputs["next_token"] == expected
            assert result.valid_length == lengths

    @rule(session=sessions, count=st.integers(1, 5))
    def generate(self, session: str, count: int) -> None:
        told = self.told[session]
        if not all(told.rows):
            return
        operation = Generate(session, count)
        self.engine.submit(operation)
        self.settle()
        if operation.future.exception(0) is not None:
            assert isinstance(operation.future.exception(0), PoolExhausted)
            self.follow(session)
            return
        limit = self.engine.session(session).max_length
        steps = [0] * len(told.rows)
        for index, row in enumerate(told.rows):
            while len(row) < limit and steps[index] < count:
                row.append(next_token(row))
                steps[index] += 1
        told.version += max(steps)
        assert operation.future.result(0).token_ids == [
            row[len(row) - taken :] for row, taken in zip(told.rows, steps, strict=True)
        ]

    def follow(self, session: str) -> None:
        """A generation that ran out of blocks keeps what it committed: read how far it came."""
        told = self.told[session]
        info = self.engine.session(session)
        for row, length in zip(told.rows, info.valid_length, strict=True):
            while len(row) < length:
                row.append(next_token(row))
        told.version = info.version

    @rule(target=sessions, session=sessions, count=st.integers(1, 2), at=picks)
    def fork(self, session: str, count: int, at: int) -> object:
        told = self.told[session]
        length = at % (min(len(row) for row in told.rows) + 1)
        children = self.engine.fork(session, count=count, at=length if at % 2 else None)
        for child in children:
            self.told[child.id] = Told([row[:length] if at % 2 else list(row) for row in told.rows])
        return multiple(*(child.id for child in children))

    @rule(session=sessions, picks=st.lists(picks, min_size=3, max_size=3))
    def truncate(self, session: str, picks: list[int]) -> None:
        told = self.told[session]
        lengths = [pick % (len(row) + 1) for pick, row in zip(picks, told.rows, strict=False)]
        operation = Truncate(session, lengths)
        self.engine.submit(operation)
        self.settle()
        told.rows = [row[:length] for row, length in zip(told.rows, lengths, strict=True)]
        told.version += 1
        assert operation.future.result(0).valid_length == lengths

    @rule(session=consumes(sessions))
    def delete(self, session: str) -> None:
        receipt = self.engine.delete_session(session)
        assert receipt.positions == sum(len(row) for row in self.told.pop(session).rows)

    @rule(session=consumes(sessions), n=st.integers(1, 30))
    def delete_while_it_runs(self, session: str, n: int) -> None:
        rows = len(self.told.pop(session).rows)
        append = Append(session, {"token_ids": np.ones((rows, n), dtype=np.int64)})
        self.engine.submit(append)
        self.engine.run_once()
        self.engine.delete_session(session)
        self.settle()
        error = append.future.exception(0) if append.future.done() else None
        assert error is None or isinstance(error, SessionGone | LengthExceeded)

    @invariant()
    def everything_is_as_told(self) -> None:
        self.engine.check()
        assert self.runner.faults == []
        for session, told in self.told.items():
            info = self.engine.session(session)
            assert info.valid_length == [len(row) for row in told.rows]
            assert info.version == told.version

    def teardown(self) -> None:
        for session in list(self.told):
            self.engine.delete_session(session)
        self.settle()
        assert self.engine.capacity().models[0].free == BLOCKS - 1


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
