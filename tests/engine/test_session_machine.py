"""Random lives of many sessions against a plain model in memory: a dict of lists."""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.batch import Append, ExportPast, Generate, ImportPast, Sample, Truncate, Want
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


class Sessions(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = FakeRunner(DECODER, blocks=BLOCKS, block_size=4)
        self.runner.poison = POISON
        self.clock = FakeClock()
        config = EngineConfig(block_size=4, token_budget=8, wait_seconds=5)
        self.engine = Engine([self.runner], config, self.clock)
        self.told: dict[str, Told] = {}

    def pick(self, number: int) -> str:
        """Any session, by number: simpler to shrink than a bundle, and never out of them."""
        if not self.told:
            self.create(1, 60)
        return list(self.told)[number % len(self.told)]

    def settle(self) -> None:
        """Runs until nothing moves, then past every deadline."""
        while self.engine.run_once():
            self.engine.check()
        self.clock.now += 6
        while self.engine.run_once():
            self.engine.check()

    @rule(rows=st.sampled_from([1, 1, 1, 2, 3]), max_length=st.sampled_from([60, 60, 60, 9, 1]))
    def create(self, rows: int, max_length: int) -> None:
        session = self.engine.create_session("decoder", batch_size=rows, max_length=max_length).id
        self.told[session] = Told([[] for _ in range(rows)])

    @rule(number=picks, data=st.data(), most=st.sampled_from([1, 6, 21]))
    def append(self, number: int, data: st.DataObject, most: int) -> None:
        self._append(number, data, most, keep=True)

    @rule(number=picks, data=st.data(), most=st.sampled_from([1, 6, 21]))
    def score(self, number: int, data: st.DataObject, most: int) -> None:
        session = self.pick(number)
        before = self.engine.session(session), self.engine.capacity()
        self._append(number, data, most, keep=False)
        after = self.engine.session(session), self.engine.capacity()
        assert after == (replace(before[0], last_used_at=after[0].last_used_at), before[1])

    def _append(self, number: int, data: st.DataObject, most: int, keep: bool) -> None:
        session = self.pick(number)
        told = self.told[session]
        n = data.draw(st.integers(1, most))
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
        append.keep = keep
        self.engine.submit(append)
        self.settle()
        error = append.future.exception(0)
        if (
            max(lengths) > self.engine.session(session).max_length
            or sum(-(-length // 4) for length in lengths) > BLOCKS - 1
        ):
            assert isinstance(error, LengthExceeded)
        elif error is not None:
            assert isinstance(error, (ModelFailed if fails else PoolExhausted, PoolExhausted))
        else:
            assert not fails
            if keep:
                told.rows, told.version = after, told.version + 1
            result = append.future.result(0)
            expected = [next_token(row) if count else None for row, count in zip(after, counts, strict=True)]
            assert result.outputs["next_token"] == expected
            assert result.valid_length == lengths

    @rule(number=picks, count=st.integers(1, 5))
    def generate(self, number: int, count: int) -> None:
        session = self.pick(number)
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

    @rule(number=picks, count=st.integers(1, 2), at=picks, now=st.booleans())
    def fork(self, number: int, count: int, at: int, now: bool) -> None:
        session = self.pick(number)
        told = self.told[session]
        length = at % (min(len(row) for row in told.rows) + 1)
        for child in self.engine.fork(session, count=count, at=None if now else length):
            self.told[child.id] = Told([list(row) if now else row[:length] for row in told.rows])

    @rule(number=picks, picks=st.lists(picks, min_size=3, max_size=3))
    def truncate(self, number: int, picks: list[int]) -> None:
        session = self.pick(number)
        told = self.told[session]
        lengths = [pick % (len(row) + 1) for pick, row in zip(picks, told.rows, strict=False)]
        operation = Truncate(session, lengths)
        self.engine.submit(operation)
        self.settle()
        told.rows = [row[:length] for row, length in zip(told.rows, lengths, strict=True)]
        told.version += 1
        assert operation.future.result(0).valid_length == lengths

    @rule(number=picks)
    def transfer(self, number: int) -> None:
        """Out of one session and into a new one."""
        told = self.told[self.pick(number)]
        export = ExportPast(self.pick(number))
        self.engine.submit(export)
        self.settle()
        past = export.future.result(0).past
        assert [ids[: len(row)].tolist() for ids, row in zip(past.arrays["token_ids"], told.rows, strict=True)] == (
            told.rows
        )
        copy = self.engine.create_session("decoder", batch_size=len(told.rows)).id
        self.told[copy] = Told([[] for _ in told.rows])
        load = ImportPast(copy, past)
        self.engine.submit(load)
        self.settle()
        if load.future.exception(0) is None:
            self.told[copy] = Told([list(row) for row in told.rows], version=1)
        else:
            assert isinstance(load.future.exception(0), PoolExhausted)

    @rule(number=picks, n=st.integers(0, 30))
    def delete(self, number: int, n: int) -> None:
        """Deletes a session, idle or (n > 0) while it appends."""
        session = self.pick(number)
        rows = self.told.pop(session).rows
        append = Append(session, {"token_ids": np.ones((len(rows), n), dtype=np.int64)})
        if n:
            self.engine.submit(append)
            self.engine.run_once()
        receipt = self.engine.delete_session(session)
        self.settle()
        if append.future.done() and append.future.exception(0) is None:
            assert receipt.positions == sum(len(row) + n for row in rows)
        else:
            assert receipt.positions == sum(len(row) for row in rows)
            error = append.future.exception(0) if n else None
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
        for session, told in list(self.told.items()):
            if all(told.rows):
                peek = Append(session, {"token_ids": np.zeros((len(told.rows), 1), dtype=np.int64)})
                self.engine.submit(peek)  # reads the whole past: the runner notes any position that is not as told
                self.settle()
            self.engine.delete_session(session)
        assert self.runner.faults == []
        self.settle()
        assert self.engine.capacity().models[0].free == BLOCKS - 1


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
