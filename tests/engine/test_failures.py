"""Failures put in at every stop between a request and its reply: the session is as before, or the commit is whole."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.batch import (
    Append,
    AppendResult,
    Batch,
    ExportPast,
    Generate,
    ImportPast,
    Once,
    Operation,
    RowResult,
    TokenEvent,
)
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError, EngineStopped, KeyReused, ModelFailed, QueueFull
from tests.fakes import ATTENTION, DECODER, FakeClock, FakeRunner, FaultyQuotas, next_token

Spoil = Callable[[list[RowResult]], list[RowResult]]


class FailingRunner(FakeRunner):
    """`spoil` changes what a batch gives, once, or raises in its place."""

    spoil: Spoil | None = None

    def run(self, batch: Batch) -> list[RowResult]:
        results = super().run(batch)
        return results if self.spoil is None else self.spoil(results)


class Unreadable:
    """What a device may leave behind: nothing can be made of it."""

    def __getattr__(self, name: str) -> Any:
        raise MemoryError(name)


def raises(results: list[RowResult]) -> list[RowResult]:
    raise RuntimeError("the device is lost")


def short(results: list[RowResult]) -> list[RowResult]:
    return results[:-1]


def long(results: list[RowResult]) -> list[RowResult]:
    return [*results, RowResult()]


def ragged(results: list[RowResult]) -> list[RowResult]:
    """Rows that cannot be stacked."""
    shapes = [(1,), (1, 2)]
    return [
        replace(result, positions={"attn_out": np.zeros(shape)}) for result, shape in zip(results, shapes, strict=False)
    ]


def unreadable(results: list[RowResult]) -> list[RowResult]:
    return [replace(result, positions={"attn_out": Unreadable()}) for result in results]  # type: ignore[dict-item]


class House:
    def __init__(self, **config: Any) -> None:
        self.runners = {spec.name: FailingRunner(spec) for spec in (DECODER, ATTENTION)}
        self.engine = Engine(self.runners.values(), EngineConfig(**config), FakeClock())

    def append(self, session: str, tokens: int = 1, **options: Any) -> Append:
        """To either kind, as many rows as it has."""
        info = self.engine.session(session)
        rows = len(info.valid_length)
        if info.kind == "decoder":
            return Append(session, {"token_ids": np.ones((rows, tokens), np.int64)}, **options)
        wide = np.ones((rows, tokens, 4), np.float32)
        mask = np.ones((rows, tokens, max(info.valid_length) + tokens), np.float32)
        return Append(session, {"query": wide, "key": wide, "value": wide, "attention_mask": mask}, **options)

    def run(self, *operations: Operation) -> list[Any]:
        """What each gave, or raised."""
        for operation in operations:
            self.engine.submit(operation)
        while self.engine.run_once():
            self.engine.check()
        return [operation.future.exception(0) or operation.future.result(0) for operation in operations]

    def state(self) -> list[Any]:
        return [*self.engine.sessions(), self.engine.capacity()]


def same(one: AppendResult, other: AppendResult) -> bool:
    arrays = [np.array_equal(one.outputs[name], other.outputs[name]) for name in one.outputs.keys() | other.outputs]
    return all(arrays) and replace(one, outputs={}) == replace(other, outputs={})


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture(params=["decoder", "attention"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("spoil", [raises, short, long, ragged, unreadable])
def test_whatever_goes_wrong_before_the_commit_leaves_everything_as_it_was(
    house: House, model: str, spoil: Spoil
) -> None:
    session = house.engine.create_session(model, batch_size=2).id
    house.run(house.append(session, 3))
    before = house.state()
    house.runners[model].spoil = spoil
    (error,) = house.run(house.append(session, 20, once=Once(b"body", "k")))
    assert isinstance(error, ModelFailed)
    assert house.state() == before
    house.runners[model].spoil = None
    retry = Once(b"body", "k")
    (result,) = house.run(house.append(session, 20, once=retry))
    assert (result.valid_length, result.version, retry.replayed) == ([23, 23], 2, False)
    again = Once(b"body", "k")
    (told,) = house.run(house.append(session, 20, once=again))
    assert same(told, result)
    assert (again.replayed, house.engine.session(session).version) == (True, 2)
    house.engine.check()


def test_books_that_fail_anywhere_leave_everything_as_it_was(model: str) -> None:
    """Before the append is queued, when it starts, when it waits for blocks: it is told, and nothing waits for it."""
    fired = 0
    for lookup in range(1, 12):
        quotas = FaultyQuotas()
        house = House(quotas=quotas)
        session = house.engine.create_session(model, batch_size=2).id
        house.run(house.append(session, 3))
        before = house.state()
        quotas.fail(lookup)
        append = house.append(session, 20)
        try:
            error: object = house.run(append)[0]
        except MemoryError as failure:
            error = failure
        quotas.mend()
        if not quotas.fired:
            assert isinstance(error, AppendResult)
            continue
        fired += 1
        assert isinstance(error, ModelFailed | MemoryError)
        assert (house.engine.idle, house.state()) == (True, before)
        house.engine.check()
        (result,) = house.run(house.append(session, 20))
        assert result.valid_length == [23, 23]
    assert fired > 5


def test_a_result_too_few_spoils_nobody_elses_append(house: House, model: str) -> None:
    """Those who shared its batch run again, alone."""
    sessions = [house.engine.create_session(model).id for _ in range(3)]
    runner = house.runners[model]
    runner.spoil = lambda results: results[:-1] if len(results) > 1 else results
    results = house.run(*(house.append(session, 2) for session in sessions))
    assert [result.valid_length for result in results] == [[2]] * 3


def test_what_is_refused_is_not_remembered(house: House, model: str) -> None:
    """Neither for its place in the queue, nor because the service stops."""
    small = House(max_waiting_per_session=1)
    session = small.engine.create_session(model).id
    first, second = small.append(session, 2), small.append(session, 2, once=Once(b"body", "k"))
    small.engine.submit(first)
    with pytest.raises(QueueFull):
        small.engine.submit(second)
    small.run()
    (result,) = small.run(small.append(session, 2, once=Once(b"body", "k")))
    assert (result.valid_length, small.engine.session(session).version) == ([4], 2)
    small.engine.stop()
    with pytest.raises(EngineStopped):
        small.engine.submit(small.append(session, 2, once=Once(b"more", "l")))
    (told,) = small.run(small.append(session, 2, once=Once(b"body", "k")))
    assert same(told, result), "what was done can still be told"


def test_a_callback_that_fails_ends_a_generation_at_its_last_commit(house: House) -> None:
    session = house.engine.create_session("decoder").id
    house.run(house.append(session, 2))
    told: list[TokenEvent] = []

    def on_token(event: TokenEvent) -> None:
        told.append(event)
        if len(told) == 2:
            raise RuntimeError("the reader's side failed")

    operation = Generate(session, 9, on_token=on_token, once=Once(b"body", "k"))
    (error,) = house.run(operation)
    assert isinstance(error, RuntimeError)
    assert operation.partial is not None
    info = house.engine.session(session)
    assert (info.valid_length, info.version) == ([4], 3)
    again = Generate(session, 9, once=Once(b"body", "k"))
    assert house.run(again) == [operation.partial]
    assert (again.future.result(0).token_ids, again.future.result(0).finish_reason) == (
        [[event.token_ids[0] for event in told]],
        ["cancelled"],
    )
    assert house.engine.session(session).version == 3


def test_transfers_that_fail_can_be_tried_again(house: House, model: str) -> None:
    session = house.engine.create_session(model).id
    house.run(house.append(session, 5))
    runner = house.runners[model]
    runner.poison = 5  # a transfer of a row of that length
    before = house.state()
    assert isinstance(house.run(ExportPast(session))[0], ModelFailed)
    assert house.state() == before
    runner.poison = None
    past = house.run(ExportPast(session))[0].past
    target = house.engine.create_session(model).id
    runner.poison = 5
    before = house.state()
    load = Once(b"file", "k")
    assert isinstance(house.run(ImportPast(target, past, once=load))[0], ModelFailed)
    assert house.state() == before
    runner.poison = None
    (info,) = house.run(ImportPast(target, past, once=load))
    assert (info.valid_length, info.version, load.replayed) == ([5], 1, False)
    assert house.run(ImportPast(target, past, once=load)) == [info]
    assert load.replayed


def test_a_key_names_one_request_of_a_session(house: House, model: str) -> None:
    session = house.engine.create_session(model).id
    waiting = house.append(session, 2, once=Once(b"body", "k"))
    house.engine.submit(waiting)
    forks = Once(b"fork", "k")
    for refused in (
        lambda: house.engine.fork(session, once=forks),
        lambda: house.engine.submit(house.append(session, 3, once=Once(b"other", "k"))),
        lambda: house.engine.delete_session(session, once=Once(b"delete", "k")),
    ):
        with pytest.raises(KeyReused):
            refused()
    waiting.future.cancel()
    assert house.run() == []
    children = house.engine.fork(session, once=forks)
    assert (house.engine.fork(session, once=forks), forks.replayed) == (children, True)
    assert len(house.engine.sessions()) == 2


def test_what_is_kept_for_retries_is_bounded_and_freed(model: str) -> None:
    house = House(replay_keys=4, replay_bytes_per_session=4096, replay_bytes=8192)
    sessions = [house.engine.create_session(model).id for _ in range(5)]
    for session in sessions:
        for number in range(6):
            house.run(house.append(session, 1 + number % 2, once=Once(b"body", f"k{number}")))
            house.engine.check()  # which counts what is kept
    for session in sessions:
        house.engine.delete_session(session)
    house.engine.check()
    assert house.engine.capacity().models[0].used == 0


def test_the_tokens_of_a_replayed_generation_are_those_of_the_first(house: House) -> None:
    session = house.engine.create_session("decoder").id
    house.run(house.append(session, 2))
    (first,) = house.run(Generate(session, 3, once=Once(b"body", "k")))
    past = [1, 1]
    for _ in range(3):
        past.append(next_token(past))
    assert first.token_ids == [past[2:]]
    assert house.run(Generate(session, 3, once=Once(b"body", "k"))) == [first]
    assert not isinstance(first, EngineError)
