"""What the engine promises its caller, on a runner whose past lives in a dict."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.batch import Append, Generate, Operation, Sample, TokenEvent, Truncate, Want
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import (
    EngineError,
    EngineStopped,
    InvalidInput,
    LengthExceeded,
    ModelFailed,
    ModelNotFound,
    Moved,
    PoolExhausted,
    QueueFull,
    SessionExists,
    SessionGone,
    SessionNotFound,
    WrongState,
)
from engine.specs import ModelSpec
from engine.stats import Receipt
from tests.fakes import ATTENTION, DECODER, FakeClock, FakeRunner, next_token

DRAW = Want(sample=Sample())


class House:
    """An engine over one fake decoder and one fake attention layer, and short ways to talk to it."""

    def __init__(self, attention: ModelSpec = ATTENTION, **config: Any) -> None:
        self.runner = FakeRunner(DECODER)
        self.attention = FakeRunner(attention)
        self.clock = FakeClock()
        self.engine = Engine([self.runner, self.attention], EngineConfig(**{"token_budget": 32, **config}), self.clock)

    def open(self, tokens: list[int] | None = None, **options: Any) -> str:
        session_id = self.engine.create_session("decoder", **options).id
        if tokens:
            self.append(session_id, tokens)
        return session_id

    def submit(self, session_id: str, *rows: list[int], **options: Any) -> Append:
        append = Append(session_id, {"token_ids": np.array(rows, dtype=np.int64)}, **options)
        self.engine.submit(append)
        return append

    def attention_session(self, batch_size: int = 1) -> str:
        return self.engine.create_session("attention", batch_size=batch_size).id

    def submit_tensors(
        self, session_id: str, query: list[list[int]] | None, key: list[list[int]] | None, **options: Any
    ) -> Append:
        """A number stands for a position of width 4. On prefill, queries see everything unless `attention_mask` is
        given."""
        wide = {
            name: np.repeat(np.array(rows, np.float32)[..., None], 4, axis=2)
            for name, rows in (("query", query), ("key", key), ("value", key))
            if rows is not None
        }
        mask = options.pop("attention_mask", None)
        if mask is None and query is not None and not options.get("step"):
            total = max(self.lengths(session_id)) + (0 if key is None else len(key[0]))
            mask = np.ones((*np.shape(query), total))
        if mask is not None:
            wide["attention_mask"] = np.asarray(mask, dtype=np.float32)
        append = Append(session_id, wide, **options)
        self.engine.submit(append)
        return append

    def ask(self, session_id: str, query: list[list[int]] | None, key: list[list[int]] | None, **options: Any) -> Any:
        append = self.submit_tensors(session_id, query, key, **options)
        self.run()
        return append.future.result(0)

    def finish(self, operation: Operation) -> Any:
        self.engine.submit(operation)
        self.run()
        return operation.future.result(0)

    def append(self, session_id: str, *rows: list[int], **options: Any) -> Any:
        append = self.submit(session_id, *rows, **options)
        self.run()
        return append.future.result(0)

    def truncate(self, session_id: str, length: int | list[int], **options: Any) -> Any:
        return self.finish(Truncate(session_id, length, **options))

    def generate(self, session_id: str, max_tokens: int, **options: Any) -> Any:
        return self.finish(Generate(session_id, max_tokens, **options))

    def run(self) -> None:
        while self.engine.run_once():
            self.engine.check()

    def lengths(self, session_id: str) -> list[int]:
        return self.engine.session(session_id).valid_length


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.engine.check()
    assert house.runner.faults == []


# Appends


def test_an_append_reports_where_it_began_and_ended(house: House) -> None:
    session = house.open()
    result = house.append(session, [1, 2, 3], want=DRAW)
    assert (result.past_length, result.valid_length, result.version) == ([0], [3], 1)
    assert result.outputs["next_token"] == [next_token([1, 2, 3])]
    result = house.append(session, [4], step=True, want=DRAW)
    assert (result.past_length, result.valid_length, result.version) == ([3], [4], 2)
    assert result.outputs["next_token"] == [next_token([1, 2, 3, 4])]


def test_a_long_append_runs_in_chunks_and_commits_once(house: House) -> None:
    session = house.open()
    result = house.append(session, list(range(90)), want=DRAW)
    assert house.runner.batches == [[(session, 0, 0, 32)], [(session, 0, 32, 64)], [(session, 0, 64, 90)]]
    assert result.version == 1
    assert result.outputs["next_token"] == [next_token(list(range(90)))]


def test_steps_run_beside_the_chunks_of_a_long_prefill(house: House) -> None:
    busy, quick = house.open(), house.open([1])
    house.runner.batches.clear()
    long = house.submit(busy, [2] * 90)
    house.engine.run_once()
    step = house.submit(quick, [3], step=True)
    house.engine.run_once()
    assert step.future.done()
    assert not long.future.done()
    assert house.runner.batches[1] == [(quick, 0, 1, 2), (busy, 0, 32, 63)]
    house.run()
    assert long.future.result(0).valid_length == [90]


def test_rows_of_a_padded_batch_advance_by_their_own_length(house: House) -> None:
    session = house.open(batch_size=2)
    result = house.append(session, [1, 2, 3], [4, 0, 0], batch_valid_length=[3, 1], want=DRAW)
    assert result.valid_length == [3, 1]
    assert result.outputs["next_token"] == [next_token([1, 2, 3]), next_token([4])]
    result = house.append(session, [5], [6], step=True, batch_valid_length=[4, 2], want=DRAW)
    assert result.outputs["next_token"] == [next_token([1, 2, 3, 5]), next_token([4, 6])]


def test_every_query_is_answered_whatever_its_row_appends(house: House) -> None:
    session = house.attention_session(batch_size=3)
    result = house.ask(session, [[1, 2], [3, 4], [5, 6]], [[10] * 3, [20] * 3, [30] * 3], batch_valid_length=[3, 1, 0])
    assert (result.past_length, result.valid_length) == ([0, 0, 0], [3, 1, 0])
    assert result.outputs["attn_out"][:, :, 0].tolist() == [[31, 32], [23, 24], [5, 6]]


def test_queries_alone_read_the_past_and_change_nothing(house: House) -> None:
    session = house.attention_session(batch_size=2)
    result = house.ask(session, None, [[1, 2, 3], [4, 0, 0]], batch_valid_length=[3, 1])
    assert (result.outputs, result.valid_length, result.version) == ({}, [3, 1], 1)
    before = house.engine.capacity()
    for options in ({"step": True}, {"step": True, "batch_valid_length": [3, 1]}, {}):
        result = house.ask(session, [[10], [20]], None, **options)
        assert (result.past_length, result.valid_length, result.version) == ([3, 1], [3, 1], 1)
        assert result.outputs["attn_out"][:, :, 0].tolist() == [[16], [24]]
    hidden = np.array([[[1, 0, 0]], [[0, 1, 1]]])
    result = house.ask(session, [[10], [20]], None, attention_mask=hidden, step=True)
    assert result.outputs["attn_out"][:, :, 0].tolist() == [[11], [20]]
    assert house.engine.capacity() == before


def test_queries_alone_keep_their_place_and_run_in_one_turn(house: House) -> None:
    """Longer than the token budget, between two appends, and never cut."""
    session = house.attention_session()
    queries = list(range(100))
    appends = [
        house.submit_tensors(session, None, [[1]]),
        house.submit_tensors(session, [queries], None, attention_mask=np.ones((1, 100, 1))),
        house.submit_tensors(session, [[0]], [[5]], step=True),
        house.submit_tensors(session, [[0]], None, step=True),
    ]
    house.run()
    results = [append.future.result(0) for append in appends]
    assert [result.version for result in results] == [1, 1, 2, 2]
    assert results[1].outputs["attn_out"][0, :, 0].tolist() == [query + 1 for query in queries]
    assert results[3].outputs["attn_out"][0, :, 0].tolist() == [6]
    assert len(house.attention.batches) == 4


def test_many_sessions_ask_and_append_in_one_batch(house: House) -> None:
    sessions = [house.attention_session() for _ in range(3)]
    for at, session in enumerate(sessions):
        house.ask(session, None, [[at + 1]])
    house.attention.batches.clear()
    appends = [
        house.submit_tensors(sessions[0], [[10]], None, step=True),
        house.submit_tensors(sessions[1], [[20]], [[7]], step=True),
        house.submit_tensors(sessions[2], None, [[8]]),
    ]
    house.run()
    assert [len(batch) for batch in house.attention.batches] == [3]
    results = [append.future.result(0) for append in appends]
    assert [result.valid_length for result in results] == [[1], [2], [2]]
    answers = [result.outputs["attn_out"].ravel()[0] if result.outputs else None for result in results]
    assert answers == [11, 29, None]


def test_many_queries_come_after_steps_and_count_against_the_budget(house: House) -> None:
    first, second, quick = [house.attention_session() for _ in range(3)]
    for session in (first, second, quick):
        house.ask(session, None, [[1]])
    house.attention.batches.clear()
    for session, n in ((first, 20), (second, 20), (quick, 1)):
        house.submit_tensors(session, [[0] * n], None)
    house.run()
    assert [[row[0] for row in batch] for batch in house.attention.batches] == [[quick, first], [second]]


def test_a_failure_among_queries_is_the_askers_own(house: House) -> None:
    sessions = [house.attention_session() for _ in range(2)]
    for session in sessions:
        house.ask(session, None, [[1]])
    house.attention.poison = 66
    asks = house.submit_tensors(sessions[0], [[10]], None, step=True)
    fails = house.submit_tensors(sessions[1], [[10]], [[66]], step=True)
    house.run()
    assert asks.future.result(0).outputs["attn_out"].ravel()[0] == 11
    assert isinstance(fails.future.exception(0), ModelFailed)
    assert house.ask(sessions[1], [[10]], None).outputs["attn_out"].ravel()[0] == 11


TENSOR = np.ones((1, 1, 4), dtype=np.float32)
PAIR = np.ones((1, 2, 4), dtype=np.float32)
MASK = np.ones((1, 1, 2), dtype=bool)


@pytest.mark.parametrize(
    ("inputs", "options", "field", "message"),
    [
        ({}, {}, "query", "is required, or key and value"),
        ({"key": TENSOR}, {}, "value", "is required with key"),
        ({"value": TENSOR, "query": TENSOR}, {"step": True}, "key", "is required with value"),
        ({"attention_mask": MASK}, {}, "query", "is required with attention_mask"),
        ({"key": TENSOR, "value": TENSOR, "attention_mask": MASK}, {}, "query", "is required with attention_mask"),
        ({"query": TENSOR}, {}, "attention_mask", "required on prefill"),
        ({"key": TENSOR, "value": TENSOR, "query": TENSOR}, {}, "attention_mask", "required on prefill"),
        ({"key": PAIR, "value": TENSOR}, {}, "value", "shape must be .1, 2, 4."),
        ({"key": PAIR, "value": TENSOR, "query": TENSOR}, {"step": True}, "key", "shape must be .1, 1, 4."),
        ({"key": TENSOR[:, :0], "value": TENSOR[:, :0]}, {}, "key", "0 positions"),
        ({"query": TENSOR[:, :0]}, {"step": True}, "query", "0 positions"),
        ({"query": TENSOR[0]}, {"step": True}, "query", r"shape must be \(1, 4, 4\)"),
        ({"query": TENSOR[0, 0]}, {"step": True}, "query", "must be .B, n, ...."),
        ({"key": TENSOR, "value": TENSOR[0, 0]}, {}, "value", "must be .B, m, ...."),
        ({"query": PAIR}, {"step": True}, "query", "asks 1 query a row, got 2"),
        ({"query": TENSOR, "key": PAIR, "value": PAIR}, {"step": True}, "key", "appends 1 position a row, got 2"),
        ({"key": TENSOR, "value": TENSOR}, {"step": True}, "query", "is required on a step"),
        ({"query": TENSOR, "attention_mask": MASK}, {"step": True}, "attention_mask", r"T = .* = 1, got \(1, 1, 2\)"),
        (
            {"key": TENSOR, "value": TENSOR},
            {"batch_valid_length": [1]},
            "batch_valid_length",
            "each must be past_length \\+ 0 to 1 and at least one row must grow",
        ),
    ],
)
def test_bad_queries_and_keys_name_their_field(
    house: House, inputs: dict[str, Any], options: dict[str, Any], field: str, message: str
) -> None:
    session = house.attention_session()
    house.ask(session, None, [[1]])
    with pytest.raises(InvalidInput, match=message) as caught:
        house.finish(Append(session, inputs, **options))
    assert caught.value.field == field
    assert house.engine.session(session).version == 1


@pytest.mark.parametrize("step", [False, True])
def test_queries_alone_need_a_past_of_the_length_they_name(house: House, step: bool) -> None:
    session = house.attention_session(batch_size=2)
    with pytest.raises(WrongState, match="the session is empty"):
        house.ask(session, [[1], [1]], None, step=step)
    house.ask(session, None, [[1], [1]])
    with pytest.raises(Moved) as caught:
        house.ask(session, [[1], [1]], None, step=step, batch_valid_length=[2, 1])
    assert caught.value.valid_length == [1, 1]


def test_a_row_without_a_past_is_answered_on_prefill_and_refused_on_a_step(house: House) -> None:
    session = house.attention_session(batch_size=2)
    house.ask(session, None, [[1], [0]], batch_valid_length=[1, 0])
    result = house.ask(session, [[10], [20]], None)
    assert result.outputs["attn_out"][:, :, 0].tolist() == [[11], [20]]
    with pytest.raises(WrongState):
        house.ask(session, [[10], [20]], None, step=True)


def test_a_layer_that_turns_by_position_takes_as_many_queries_as_keys() -> None:
    house = House(attention=replace(ATTENTION, aligned=True))
    session = house.attention_session()
    for query, key in (([[1]], None), (None, [[1]]), ([[1, 2]], [[1]])):
        with pytest.raises(InvalidInput, match="as many of both") as caught:
            house.ask(session, query, key)
        assert caught.value.field == "query"
    assert house.ask(session, [[1, 2]], [[3, 4]]).valid_length == [2]


@pytest.mark.parametrize(
    ("inputs", "options", "field", "message"),
    [
        ({}, {}, "token_ids", "is required"),
        ({"query": [[1]]}, {}, "query", "takes token_ids"),
        ({"token_ids": [[1], [1]]}, {}, "token_ids", "shape must be"),
        ({"token_ids": [[]]}, {}, "token_ids", "0 positions"),
        ({"token_ids": [[97]]}, {}, "token_ids", "values must be 0 to 96"),
        ({"token_ids": [[-1]]}, {}, "token_ids", "values must be 0 to 96"),
        ({"token_ids": [[1, 2]]}, {"step": True}, "token_ids", "a step appends 1"),
        ({"token_ids": [[1]]}, {"batch_valid_length": [3]}, "batch_valid_length", "0 to 1"),
        ({"token_ids": [[1]]}, {"batch_valid_length": [0]}, "batch_valid_length", "at least one row must grow"),
        ({"token_ids": [[1]]}, {"batch_valid_length": [1, 1]}, "batch_valid_length", "one length a row"),
        ({"token_ids": [[1]]}, {"want": Want(need_weights=True)}, "need_weights", "gives logits"),
        ({"token_ids": [[1]]}, {"want": Want(top_logprobs=98)}, "top_logprobs", "model decoder gives"),
        ({"token_ids": [[1]]}, {"want": Want(sample=Sample(top_p=0))}, "sample.top_p", "out of range"),
    ],
)
def test_bad_input_names_its_field_and_changes_nothing(
    house: House, inputs: dict[str, Any], options: dict[str, Any], field: str, message: str
) -> None:
    session = house.open()
    arrays = {name: np.array(rows, dtype=np.int64) for name, rows in inputs.items()}
    with pytest.raises(InvalidInput, match=message) as caught:
        house.finish(Append(session, arrays, **options))
    assert caught.value.field == field
    assert house.engine.session(session).version == 0
    assert house.engine.capacity().models[0].used == 0


def test_too_long_is_refused_before_anything_runs(house: House) -> None:
    session = house.open([1] * 10, max_length=12)
    with pytest.raises(LengthExceeded, match="13 positions pass the session's max_length 12"):
        house.append(session, [1, 2, 3])
    assert house.append(session, [1, 2]).valid_length == [12]
    wide = house.open(batch_size=2)
    with pytest.raises(LengthExceeded, match="can never fit in 19"):
        house.append(wide, [1] * 160, [1] * 160)


def test_a_step_needs_a_past(house: House) -> None:
    with pytest.raises(WrongState, match="prefill it"):
        house.append(house.open(), [1], step=True)


def test_a_step_at_another_length_or_version_is_refused(house: House) -> None:
    session = house.open([1, 2])
    with pytest.raises(Moved) as caught:
        house.append(session, [3], step=True, batch_valid_length=[4])
    assert (caught.value.version, caught.value.valid_length) == (1, [2])
    with pytest.raises(Moved, match="at version 1, not 0"):
        house.append(session, [3], expected_version=0)
    assert house.append(session, [3], step=True, batch_valid_length=[3], expected_version=1).version == 2


# Order, waiting, failing


def test_appends_to_one_session_run_in_arrival_order(house: House) -> None:
    session = house.open()
    appends = [house.submit(session, [token], want=DRAW) for token in (1, 2, 3)]
    house.run()
    results = [append.future.result(0) for append in appends]
    assert [result.version for result in results] == [1, 2, 3]
    assert results[2].outputs["next_token"] == [next_token([1, 2, 3])]


def test_a_refused_append_lets_the_next_one_run(house: House) -> None:
    session = house.open([1], max_length=4)
    busy = house.submit(session, [2])
    too_long, fits = house.submit(session, [3, 4, 5]), house.submit(session, [3])
    house.run()
    assert busy.future.result(0).valid_length == [2]
    assert isinstance(too_long.future.exception(0), LengthExceeded)
    assert fits.future.result(0).valid_length == [3]


def test_a_failing_row_never_hurts_its_batch(house: House) -> None:
    good, bad = [house.open([1]) for _ in range(3)], house.open([1])
    house.runner.poison = 66
    appends = [house.submit(session, [2], step=True, want=DRAW) for session in good]
    failing = house.submit(bad, [66])
    house.run()
    for append in appends:
        assert append.future.result(0).outputs["next_token"] == [next_token([1, 2])]
    assert isinstance(failing.future.exception(0), ModelFailed)
    assert house.lengths(bad) == [1]
    assert house.append(bad, [2], want=DRAW).outputs["next_token"] == [next_token([1, 2])]


def test_a_failure_in_a_late_chunk_takes_the_whole_append_back(house: House) -> None:
    session = house.open([5] * 20)
    house.runner.poison = 66
    before = house.engine.session(session)
    with pytest.raises(ModelFailed):
        house.append(session, [1] * 70 + [66])
    after = house.engine.session(session)
    assert (after.valid_length, after.version, after.blocks) == (before.valid_length, before.version, before.blocks)


def test_a_failure_after_leaving_a_shared_block_gives_it_back(house: House) -> None:
    parent = house.open([5] * 20)
    child = house.engine.fork(parent)[0].id
    house.runner.poison = 66
    with pytest.raises(ModelFailed):
        house.append(child, [66])
    assert house.engine.session(child).shared_blocks == 2
    assert house.append(child, [7], want=DRAW).outputs["next_token"] == [next_token([5] * 20 + [7])]


def test_an_append_waits_for_blocks_and_is_refused_after_the_deadline(house: House) -> None:
    hog, session = house.open([1] * 190), house.open([1] * 100)
    waiting = house.submit(session, [2] * 60)
    house.run()
    assert not waiting.future.done()
    house.clock.now += 31
    house.run()
    assert isinstance(waiting.future.exception(0), PoolExhausted)
    again = house.submit(session, [2] * 60, want=DRAW)
    house.run()
    house.engine.delete_session(hog)
    house.run()
    assert again.future.result(0).outputs["next_token"] == [next_token([1] * 100 + [2] * 60)]


def test_a_cancelled_append_is_dropped_if_it_has_not_run(house: House) -> None:
    session = house.open([1])
    first, second = house.submit(session, [2]), house.submit(session, [3])
    assert second.future.cancel()
    house.run()
    assert first.future.result(0).valid_length == [2]
    assert house.lengths(session) == [2]
    unscheduled = house.submit(session, [4])
    assert unscheduled.future.cancel()
    house.run()
    assert house.lengths(session) == [2]


def test_queues_are_bounded(house: House) -> None:
    session = house.open()
    for token in range(16):
        house.submit(session, [token])
    with pytest.raises(QueueFull, match="on this session"):
        house.submit(session, [1])
    house.run()
    small = House(max_waiting=2)
    sessions = [small.open() for _ in range(3)]
    small.submit(sessions[0], [1])
    small.submit(sessions[1], [1])
    with pytest.raises(QueueFull, match="2 operations wait"):
        small.submit(sessions[2], [1])


# Forking, truncating, deleting


def test_a_fork_continues_as_its_parent_would(house: House) -> None:
    parent = house.open([1, 2, 3])
    children = [child.id for child in house.engine.fork(parent, count=2)]
    assert house.engine.capacity().models[0].used == 1
    first = house.append(children[0], [4], want=DRAW)
    assert house.append(parent, [4], want=DRAW).outputs == first.outputs
    other = house.append(children[1], [9], want=DRAW)
    assert other.outputs["next_token"] == [next_token([1, 2, 3, 9])]
    assert house.engine.session(children[0]).parent == parent


def test_a_fork_may_start_earlier_and_while_the_parent_is_busy(house: House) -> None:
    parent = house.open(list(range(20)))
    running = house.submit(parent, [30] * 60)
    house.engine.run_once()
    child = house.engine.fork(parent, at=17)[0]
    latest = house.engine.fork(parent)[0]
    assert (child.valid_length, latest.valid_length) == ([17], [20])
    assert child.blocks == child.shared_blocks == 2
    house.run()
    assert running.future.result(0).valid_length == [80]
    result = house.append(child.id, [40], want=DRAW)
    assert result.outputs["next_token"] == [next_token([*range(17), 40])]
    assert house.append(latest.id, [41], want=DRAW).outputs["next_token"] == [next_token([*range(20), 41])]


def test_fork_read_and_delete_take_the_version_that_they_expect(house: House) -> None:
    session = house.open([1, 2, 3])
    house.submit(session, [4])  # runs, and has not committed: the version is what was last committed
    for refused in (house.engine.fork, house.engine.session, house.engine.delete_session):
        with pytest.raises(Moved) as moved:
            refused(session, expected_version=2)
        assert (moved.value.version, moved.value.valid_length) == (1, [3])
    assert [session.id for session in house.engine.sessions()] == [session], "no child, and still there"
    assert house.engine.session(session, expected_version=1).valid_length == [3]
    assert house.engine.fork(session, expected_version=1)[0].valid_length == [3]
    assert house.engine.delete_session(session, expected_version=1).positions == 3


@pytest.mark.parametrize("at", [-1, 4, [1, 1]])
def test_a_fork_outside_the_past_is_refused(house: House, at: int | list[int]) -> None:
    with pytest.raises(InvalidInput, match="at: "):
        house.engine.fork(house.open([1, 2, 3]), at=at)
    with pytest.raises(InvalidInput, match="count: "):
        house.engine.fork(house.open([1]), count=0)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 39])
def test_truncate_then_append_equals_never_having_appended(house: House, length: int) -> None:
    tokens = list(range(40))
    session = house.open(tokens)
    info = house.truncate(session, length)
    assert (info.valid_length, info.version, info.blocks) == ([length], 2, -(-length // 16))
    result = house.append(session, [50, 51], want=DRAW)
    assert result.outputs["next_token"] == [next_token([*tokens[:length], 50, 51])]


def test_truncate_waits_its_turn_and_checks_its_length(house: House) -> None:
    session = house.open([1, 2])
    append = house.submit(session, [3])
    cut = Truncate(session, 1)
    house.engine.submit(cut)
    assert not cut.future.done()
    house.run()
    assert append.future.result(0).valid_length == [3]
    assert cut.future.result(0).valid_length == [1]
    for length in (-1, 2, [0, 0]):
        with pytest.raises(InvalidInput, match="length: "):
            house.truncate(session, length)
    with pytest.raises(Moved):
        house.truncate(session, 0, expected_version=1)


def test_deleting_frees_at_once_and_says_what(house: House) -> None:
    parent = house.open([1] * 40)
    child = house.engine.fork(parent, at=32)[0].id
    assert house.engine.delete_session(parent) == Receipt(parent, 40, 512, 1, 2)
    assert house.engine.delete_session(child) == Receipt(child, 32, 1024, 2, 0)
    assert house.engine.capacity().models[0].free == 19
    with pytest.raises(SessionGone, match="deleted"):
        house.engine.session(child)


def test_deleting_under_a_running_append_ends_it(house: House) -> None:
    session, mate = house.open([1] * 20), house.open([1])
    running = house.submit(session, [2] * 80)
    waiting = house.submit(session, [3])
    house.engine.run_once()
    house.engine.delete_session(session)
    house.engine.check()
    for append in (running, waiting):
        assert isinstance(append.future.exception(0), SessionGone)
    assert house.append(mate, [2], want=DRAW).outputs["next_token"] == [next_token([1, 2])]
    assert house.engine.capacity().models[0].used == 1


def test_deleting_between_leaving_a_shared_block_and_its_copy(house: House) -> None:
    parent = house.open([5] * 20)
    child = house.engine.fork(parent)[0].id
    house.engine.fork(parent, at=16)
    house.runner.poison = 66
    mate = house.open([1])
    house.submit(child, [7])
    house.submit(mate, [66])
    house.engine.run_once()  # both fail and will be tried alone
    assert house.engine.session(parent).shared_blocks == 2
    assert house.engine.delete_session(child) == Receipt(child, 20, 512, 1, 2)
    assert house.engine.session(parent).shared_blocks == 1  # and not at the next pass only
    house.engine.check()
    house.run()
    assert house.append(parent, [6], want=DRAW).outputs["next_token"] == [next_token([5] * 20 + [6])]


# Sessions


def test_sessions_are_kept_apart_by_tenant(house: House) -> None:
    session = house.open(tenant="a", session_id="mine")
    assert house.engine.create_session("decoder", tenant="b", session_id="mine").id == "mine"
    assert [info.id for info in house.engine.sessions("a")] == [session]
    with pytest.raises(SessionNotFound):
        house.engine.session("mine")
    house.engine.delete_session("mine", tenant="b")
    assert house.engine.session("mine", tenant="a").state == "idle"
    house.engine.delete_session("mine", tenant="a")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "other"}, ModelNotFound),
        ({"session_id": "taken"}, SessionExists),
        ({"session_id": "no/slash"}, InvalidInput),
        ({"session_id": ""}, InvalidInput),
        ({"session_id": "x" * 65}, InvalidInput),
        ({"batch_size": 0}, InvalidInput),
        ({"max_length": 201}, InvalidInput),
        ({"max_length": 0}, InvalidInput),
        ({"ttl_seconds": 0.0}, InvalidInput),
        ({"ttl_seconds": float("nan")}, InvalidInput),
    ],
)
def test_what_cannot_be_created(house: House, options: dict[str, Any], error: type[EngineError]) -> None:
    house.open(session_id="taken")
    with pytest.raises(error):
        house.engine.create_session(**{"model": "decoder", **options})
    assert len(house.engine.sessions()) == 1


def test_an_idle_session_expires_and_a_read_does_not_revive_it(house: House) -> None:
    session = house.open([1], ttl_seconds=10)
    house.clock.now += 9
    assert house.engine.session(session).expires_at == 1010
    house.clock.now += 1
    with pytest.raises(SessionGone, match="expired"):
        house.engine.session(session)
    house.engine.run_once()
    assert house.engine.capacity().models[0].used == 0
    with pytest.raises(SessionGone, match="expired"):
        house.append(session, [1])


def test_an_append_puts_off_expiry(house: House) -> None:
    session = house.open([1], ttl_seconds=10)
    house.clock.now += 9
    house.append(session, [2])
    house.clock.now += 9
    assert house.engine.session(session).valid_length == [2]


# Generation


def test_generate_is_the_same_as_stepping_by_hand(house: House) -> None:
    by_hand, served = house.open([1, 2, 3]), house.open([1, 2, 3])
    tokens: list[int] = []
    token = next_token([1, 2, 3])
    for _ in range(5):
        tokens.append(token)
        token = house.append(by_hand, [token], step=True, want=DRAW).outputs["next_token"][0]
    events: list[TokenEvent] = []
    result = house.generate(served, 5, on_token=events.append)
    assert result.token_ids == [tokens]
    assert (result.past_length, result.valid_length, result.version) == ([3], [8], 6)
    assert result.finish_reason == ["length"]
    assert [event.token_ids for event in events] == [[token] for token in tokens]
    assert [event.valid_length for event in events] == [[4], [5], [6], [7], [8]]
    assert house.append(by_hand, [9], want=DRAW).outputs == house.append(served, [9], want=DRAW).outputs


def test_a_stop_id_ends_a_row_before_it(house: House) -> None:
    session = house.open([1, 2, 3])
    free = house.generate(house.engine.fork(session)[0].id, 4).token_ids[0]
    result = house.generate(session, 4, stop_ids=frozenset({free[2]}))
    assert result.token_ids == [free[:2]]
    assert result.finish_reason == ["stop"]
    assert house.lengths(session) == [5]


def test_rows_stop_by_themselves(house: House) -> None:
    session = house.open(batch_size=2)
    house.append(session, [1, 2, 3], [4, 5, 6])
    result = house.generate(session, 3, stop=lambda row, token: row == 0 and token == next_token([1, 2, 3]))
    assert [len(tokens) for tokens in result.token_ids] == [0, 3]
    assert result.finish_reason == ["stop", "length"]
    assert result.valid_length == [3, 6]


def test_generation_ends_at_max_length(house: House) -> None:
    session = house.open([1, 2], max_length=4)
    result = house.generate(session, 10)
    assert (result.valid_length, result.finish_reason) == ([4], ["length"])
    assert house.generate(session, 1).token_ids == [[]]


def test_generation_after_a_truncate_or_an_earlier_fork_replays_the_last_position(house: House) -> None:
    session = house.open([1, 2, 3, 4])
    child = house.engine.fork(session, at=2)[0].id
    house.truncate(session, 2)
    expected = house.generate(house.open([1, 2]), 3).token_ids
    assert house.generate(session, 3).token_ids == expected
    assert house.generate(child, 3).token_ids == expected


def test_a_cancelled_generation_stays_at_its_last_token(house: House) -> None:
    session = house.open([1])
    operation = Generate(session, 50)
    house.engine.submit(operation)
    for _ in range(4):
        house.engine.run_once()
    operation.cancelled = True
    house.run()
    result = operation.future.result(0)
    assert result.finish_reason == ["cancelled"]
    assert house.lengths(session) == [1 + len(result.token_ids[0])]


def test_a_callback_that_raises_ends_only_its_generation(house: House) -> None:
    session, mate = house.open([1]), house.open([1])

    def fail(event: TokenEvent) -> None:
        raise ConnectionError("reader gone")

    operation, other = Generate(session, 5, on_token=fail), Generate(mate, 5)
    house.engine.submit(operation)
    house.engine.submit(other)
    house.run()
    assert isinstance(operation.future.exception(0), ConnectionError)
    assert house.lengths(session) == [2]
    assert house.lengths(mate) == [6]


def test_generation_needs_a_past_a_decoder_and_a_token(house: House) -> None:
    with pytest.raises(WrongState):
        house.generate(house.open(), 1)
    with pytest.raises(InvalidInput, match="max_tokens"):
        house.generate(house.open([1]), 0)
    with pytest.raises(InvalidInput, match="nothing to generate"):
        house.generate(house.engine.create_session("attention").id, 1)


# Stopping


def test_a_stopping_engine_ends_what_it_has_and_takes_no_more(house: House) -> None:
    session = house.open([1])
    append = house.submit(session, [2] * 60)
    house.engine.stop()
    with pytest.raises(EngineStopped):
        house.submit(session, [3])
    with pytest.raises(EngineStopped):
        house.open()
    assert not house.engine.idle
    house.run()
    assert house.engine.idle
    assert append.future.result(0).valid_length == [61]


def test_abort_ends_everything_and_leaves_the_sessions(house: House) -> None:
    session, other = house.open([1]), house.open([2])
    running, waiting = house.submit(session, [2] * 60), house.submit(session, [3])
    generation = Generate(other, 50)
    house.engine.submit(generation)
    house.engine.run_once()
    house.engine.abort(EngineStopped("the engine stopped"))
    for future in (running.future, waiting.future, generation.future):
        assert isinstance(future.exception(0), EngineStopped)
    house.engine.check()
    assert house.lengths(session) == [1]


def test_wait_returns_when_work_arrives_or_a_session_may_expire(house: House) -> None:
    session = house.open()
    house.run()
    threading.Timer(0.05, lambda: house.submit(session, [1])).start()
    house.engine.wait(10)
    assert house.engine.run_once()
    house.run()
    house.open(ttl_seconds=0.01)
    house.engine.wait(10)


@pytest.mark.parametrize("fails", [False, True])
def test_a_fork_in_the_midst_of_its_parents_append_has_the_block_that_both_shared(house: House, fails: bool) -> None:
    """The append writes to a copy of the shared tail block, which is made in its pass: a pass that never comes so far
    leaves the copy unwritten."""
    parent = house.open([1, 2, 3])
    house.engine.fork(parent)  # so that the tail block is shared
    children: list[str] = []

    def fork_and_fail(_: object) -> None:
        if not children:
            children.append(house.engine.fork(parent)[0].id)
            if fails:
                raise RuntimeError("before anything is copied")

    house.runner.before_run = fork_and_fail
    append = house.submit(parent, [4])
    house.run()
    assert isinstance(append.future.exception(0), ModelFailed) == fails
    assert house.append(children[0], [9]).valid_length == [4]  # the runner notes a past that is not as told
    assert house.append(parent, [5]).valid_length == [4 if fails else 5]
