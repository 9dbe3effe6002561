"""Pasts out of sessions and into them: what the engine promises, on a runner whose past lives in a dict."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.batch import (
    Append,
    ExportPast,
    ExportResult,
    Generate,
    ImportPast,
    Operation,
    Sample,
    SessionPast,
    Truncate,
    Want,
)
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import (
    EngineError,
    EngineStopped,
    InvalidInput,
    LengthExceeded,
    ModelFailed,
    Moved,
    PoolExhausted,
    SessionGone,
    SessionNotFound,
    WrongState,
)
from engine.specs import ModelSpec
from engine.stats import SessionInfo
from tests.fakes import ATTENTION, DECODER, FakeClock, FakeRunner, next_token

DRAW = Want(sample=Sample())


class House:
    """An engine over one fake model, and short ways to talk to it."""

    def __init__(self, spec: ModelSpec = DECODER, blocks: int = 20, **config: Any) -> None:
        self.spec = spec
        self.runner = FakeRunner(spec, blocks)
        self.clock = FakeClock()
        self.engine = Engine([self.runner], EngineConfig(**{"token_budget": 32, **config}), self.clock)

    def open(self, *rows: list[int], **options: Any) -> str:
        """A session, each row of it prefilled with its own numbers."""
        session = self.engine.create_session(self.spec.name, batch_size=len(rows) or 1, **options).id
        if any(rows):
            longest = max(map(len, rows))
            padded = np.array([row + [0] * (longest - len(row)) for row in rows])
            inputs = {self.spec.inputs[0].name: padded}
            if self.spec.history is None:
                wide = np.repeat(padded[..., None], 4, axis=2).astype(np.float32)
                mask = np.ones((len(rows), longest, longest), dtype=bool)
                inputs = {"query": wide, "key": wide, "value": wide, "attention_mask": mask}
            self.finish(Append(session, inputs, batch_valid_length=list(map(len, rows))))
        return session

    def submit(self, session: str, *tokens: int) -> Append:
        append = Append(session, {"token_ids": np.array([tokens])}, want=DRAW)
        self.engine.submit(append)
        return append

    def finish(self, operation: Operation) -> Any:
        self.engine.submit(operation)
        self.run()
        return operation.future.result(0)

    def run(self) -> None:
        while self.engine.run_once():
            self.engine.check()

    def export(self, session: str, **options: Any) -> ExportResult:
        result: ExportResult = self.finish(ExportPast(session, **options))
        return result

    def load(self, session: str, past: SessionPast, **options: Any) -> SessionInfo:
        info: SessionInfo = self.finish(ImportPast(session, past, **options))
        return info

    def refuses(self, error: type[EngineError], session: str, past: SessionPast, **options: Any) -> EngineError:
        """Checks that the import is refused and nothing is left of it."""
        before = self.engine.session(session), self.engine.capacity()
        with pytest.raises(error) as caught:
            self.load(session, past, **options)
        after = self.engine.session(session), self.engine.capacity()
        assert replace(after[0], last_used_at=0) == replace(before[0], last_used_at=0)
        assert after[1] == before[1]
        return caught.value


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.engine.check()
    assert house.runner.faults == []


def same(left: SessionPast, right: SessionPast) -> bool:
    def told(past: SessionPast) -> list[Any]:
        arrays = {name: (array.dtype, array.shape, array.tobytes()) for name, array in past.arrays.items()}
        return [past.valid_length, past.kind, past.fingerprint, arrays]

    return told(left) == told(right)


# Out


def test_an_export_is_the_past_in_mindspore_s_layout(house: House) -> None:
    rows = [[1, 2, 3], list(range(20))]
    session = house.open(*rows)
    result = house.export(session)
    assert (result.version, result.past.valid_length) == (1, [3, 20])
    assert (result.past.kind, result.past.fingerprint) == ("decoder", "fake")
    arrays = result.past.arrays
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "key_past.0": ("float16", (2, 1, 8, 20)),
        "value_past.0": ("float16", (2, 1, 20, 8)),
        "token_ids": ("int64", (2, 20)),
    }
    padded = [[1, 2, 3] + [0] * 17, list(range(20))]
    assert arrays["token_ids"].tolist() == padded
    assert arrays["key_past.0"][:, 0, 5].tolist() == padded
    assert (-arrays["value_past.0"][:, 0, :, 7]).tolist() == padded


def test_a_model_that_keeps_no_ids_exports_none() -> None:
    house = House(ATTENTION)
    past = house.export(house.open([1, 2], [3])).past
    assert set(past.arrays) == {"key_past.0", "value_past.0"}
    assert past.arrays["key_past.0"][:, 0, 0].tolist() == [[1, 2], [3, 0]]


def test_an_export_changes_nothing(house: House) -> None:
    session = house.open([1, 2, 3])
    before = house.engine.session(session)
    house.export(session)
    assert house.engine.session(session) == before
    assert house.finish(Generate(session, 1)).token_ids == [[next_token([1, 2, 3])]]
    assert house.runner.replayed == 0, "the last position's outputs were kept"


def test_an_export_takes_its_turn_among_the_session_s_operations(house: House) -> None:
    session = house.open([1])
    append, export, cut = house.submit(session, *[2] * 40), ExportPast(session), Truncate(session, 1)
    house.engine.submit(export)
    house.engine.submit(cut)
    house.run()
    assert append.future.done()
    assert export.future.result(0).past.arrays["token_ids"].tolist() == [[1] + [2] * 40]
    assert cut.future.result(0).valid_length == [1]


def test_a_fork_exports_what_it_shares(house: House) -> None:
    parent = house.open(list(range(20)))
    child = house.engine.fork(parent, at=18)[0].id
    assert house.export(child).past.arrays["token_ids"].tolist() == [list(range(18))]
    assert same(house.export(house.engine.fork(parent)[0].id).past, house.export(parent).past)


def test_what_an_export_refuses(house: House) -> None:
    session = house.open([1, 2])
    with pytest.raises(Moved) as caught:
        house.export(session, expected_version=0)
    assert (caught.value.version, caught.value.valid_length) == (1, [2])
    with pytest.raises(SessionNotFound):
        house.export(session, tenant="another")
    house.runner.poison = 2
    with pytest.raises(ModelFailed):
        house.export(session)
    assert house.finish(Append(session, {"token_ids": np.array([[3]])})).valid_length == [3]
    assert house.export(session, expected_version=2).version == 2


def test_an_export_is_bounded_before_it_is_allocated() -> None:
    """One long row among many short ones is padded far beyond what the session holds."""
    house = House(max_past_bytes=4 * 20 * (2 * 8 * 2 + 8))
    fits, padded = house.open([1] * 20, [1], [1], [1]), house.open([1] * 21, [1], [1], [1])
    assert house.export(fits).past.valid_length == [20, 1, 1, 1]
    with pytest.raises(LengthExceeded, match=r"4 rows of 21 positions take 3360 bytes, and 3200 may leave") as caught:
        house.export(padded)
    assert caught.value.field == "past"
    assert house.runner.transfers == [("read", [20, 1, 1, 1])]


# In


@pytest.mark.parametrize("rows", [[[1, 2, 3]], [[1] * 16], [list(range(17)), [5], [7] * 40], [[], [4, 5]]])
def test_an_import_goes_on_as_the_original(house: House, rows: list[list[int]]) -> None:
    original, copy = house.open(*rows), house.open(*[[] for _ in rows])
    past = house.export(original).past
    info = house.load(copy, past)
    assert (info.valid_length, info.version, info.state) == (list(map(len, rows)), 1, "idle")
    assert info.blocks == sum(-(-len(row) // 16) for row in rows)
    assert same(house.export(copy).past, past)
    step = {"token_ids": np.full((len(rows), 1), 9)}
    for session in (original, copy):
        drawn = house.finish(Append(session, step, want=DRAW)).outputs["next_token"]
        assert drawn == [next_token([*row, 9]) for row in rows]


def test_a_generation_after_an_import_replays_the_last_position(house: House) -> None:
    session = house.open()
    house.load(session, house.export(house.open([1, 2, 3])).past)
    assert house.finish(Generate(session, 1)).token_ids == [[next_token([1, 2, 3])]]
    assert house.runner.replayed == 1


def test_a_past_of_nothing_goes_in_and_out(house: House) -> None:
    past = house.export(house.open([], [])).past
    assert past.arrays["key_past.0"].shape == (2, 1, 8, 0)
    session = house.open([], [])
    info = house.load(session, past)
    assert (info.valid_length, info.version, info.blocks) == ([0, 0], 1, 0)


def test_a_session_cut_to_nothing_is_empty(house: House) -> None:
    past = house.export(house.open([1, 2, 3])).past
    session = house.open([4, 5])
    error = house.refuses(WrongState, session, past)
    assert "empty" in str(error)
    house.finish(Truncate(session, 0))
    info = house.load(session, past, expected_version=2)
    assert (info.valid_length, info.version) == ([3], 3)


def test_an_import_is_one_turn_of_its_own_whatever_its_length(house: House) -> None:
    past = house.export(house.open([7] * 90)).past
    session, mate = house.open(), house.open([1])
    house.runner.batches.clear()
    house.engine.submit(ImportPast(session, past))
    house.submit(mate, 2)
    house.engine.run_once()
    assert (house.runner.transfers[-1], house.runner.batches) == (("write", [90]), [])
    house.engine.run_once()
    assert house.runner.batches == [[(mate, 0, 1, 2)]]


@pytest.mark.parametrize("first", ["transfers", "steps"])
def test_a_transfer_shares_no_batch(house: House, first: str) -> None:
    past = house.export(house.open([7, 8])).past
    session, mates = house.open(), [house.open([1]), house.open([2])]
    house.runner.batches.clear()
    transfers: list[Operation] = [ImportPast(session, past), ExportPast(house.open([3]))]
    for operation in transfers if first == "transfers" else []:
        house.engine.submit(operation)
    steps = [house.submit(mate, 4) for mate in mates]
    for operation in transfers if first == "steps" else []:
        house.engine.submit(operation)
    house.run()
    assert house.runner.batches[-1] == [(mate, 0, 1, 2) for mate in mates]
    assert [step.future.result(0).outputs["next_token"] for step in steps] == [
        [next_token([1, 4])],
        [next_token([2, 4])],
    ]
    assert all(transfer.future.exception(0) is None for transfer in transfers)
    assert same(house.export(session).past, past)


def test_transfers_do_not_wait_behind_endless_steps(house: House) -> None:
    busy, session = house.open([1]), house.open()
    past = house.export(house.open([7] * 90)).past
    generation, export, load = Generate(busy, 50), ExportPast(house.open([2])), ImportPast(session, past)
    for operation in (generation, export, load):
        house.engine.submit(operation)
    for _ in range(5):
        house.engine.run_once()
    assert export.future.done()
    assert load.future.done()
    assert not generation.future.done()
    house.run()


def test_slots_past_the_valid_length_are_ignored(house: House) -> None:
    past = house.export(house.open([1, 2, 3], [4] * 5)).past
    loud = {name: np.array(array) for name, array in past.arrays.items()}
    loud["key_past.0"][0, :, :, 3:] = np.nan
    loud["value_past.0"][0, :, 3:] = np.inf
    loud["token_ids"][0, 3:] = -1
    session = house.open([], [])
    house.load(session, replace(past, arrays=loud))
    assert same(house.export(session).past, past)


def test_more_slots_than_any_row_needs_are_ignored(house: House) -> None:
    """As in a cache of fixed size."""
    past = house.export(house.open(list(range(30)), [5] * 20)).past
    session = house.open([], [])
    house.load(session, replace(past, valid_length=[17, 2]))
    expected = house.open(list(range(17)), [5] * 2)
    assert same(house.export(session).past, house.export(expected).past)


Change = Callable[[dict[str, Any]], object]


def changed(name: str, how: Callable[[Any], Any]) -> Change:
    return lambda arrays: arrays.update({name: how(arrays[name])})


def put(name: str, value: float) -> Change:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][(0,) * arrays[name].ndim] = value

    return change


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        (lambda arrays: arrays.pop("key_past.0"), "key_past.0", "is required: float16"),
        (lambda arrays: arrays.pop("value_past.0"), "value_past.0", "is required"),
        (lambda arrays: arrays.pop("token_ids"), "token_ids", "is required: int64"),
        (lambda arrays: arrays.update({"key_past.1": arrays["key_past.0"]}), "key_past.1", "layers are 0 to 0"),
        (lambda arrays: arrays.update({"stranger": arrays["key_past.0"]}), "stranger", "not in a past"),
        (changed("key_past.0", lambda array: array.astype(np.float32)), "key_past.0", "dtype must be float16"),
        (changed("token_ids", lambda array: array.astype(np.int32)), "token_ids", "dtype must be int64"),
        (changed("key_past.0", lambda array: array[:, :, :7]), "key_past.0", r"shape must be \(2, 1, 8, 3\)"),
        (changed("key_past.0", lambda array: array[0]), "key_past.0", "shape must be"),
        (changed("key_past.0", lambda array: array[0, 0, 0, 0]), "key_past.0", "shape must be"),
        (changed("value_past.0", lambda array: array[:, :, :2]), "value_past.0", r"shape must be \(2, 1, 3, 8\)"),
        (changed("value_past.0", lambda array: array.swapaxes(2, 3)), "value_past.0", "shape must be"),
        (changed("token_ids", lambda array: array[:1]), "token_ids", r"shape must be \(2, 3\)"),
        (put("key_past.0", np.nan), "key_past.0", "NaN or infinite"),
        (put("value_past.0", np.inf), "value_past.0", "NaN or infinite"),
        (put("token_ids", 97), "token_ids", "values must be 0 to 96, got 2 to 97"),
        (put("token_ids", -1), "token_ids", "values must be 0 to 96, got -1 to 4"),
    ],
)
def test_a_past_that_is_off_names_what_is(house: House, change: Change, field: str, message: str) -> None:
    past = house.export(house.open([1, 2, 3], [4])).past
    arrays = {name: np.array(array) for name, array in past.arrays.items()}
    change(arrays)
    error = house.refuses(InvalidInput, house.open([], []), replace(past, arrays=arrays))
    assert isinstance(error, InvalidInput)
    assert error.field == field
    with pytest.raises(InvalidInput, match=message):
        raise error


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"kind": "attention"}, "kind", "'decoder'"),
        ({"fingerprint": "x" * 500}, "fingerprint", "model decoder has 'fake'"),
        ({"valid_length": [3]}, "batch_valid_length", "has 1 rows, the session has 2"),
        ({"valid_length": [3, -1]}, "batch_valid_length", "each must be 0 to 3"),
        ({"valid_length": [4, 1]}, "batch_valid_length", "each must be 0 to 3, the past's slots"),
    ],
)
def test_a_past_of_another_model_or_size(house: House, options: dict[str, Any], field: str, message: str) -> None:
    past = house.export(house.open([1, 2, 3], [4])).past
    error = house.refuses(InvalidInput, house.open([], []), replace(past, **options))
    assert isinstance(error, InvalidInput)
    assert (error.field, message in str(error)) == (field, True)
    assert len(str(error)) < 300


def test_too_long_for_the_session_or_the_pool(house: House) -> None:
    past = house.export(house.open([1] * 13)).past
    error = house.refuses(LengthExceeded, house.open(max_length=12), past)
    assert str(error) == "batch_valid_length: 13 positions pass the session's max_length 12"
    large = House(blocks=40)
    past = large.export(large.open([1] * 110, [1] * 110, [1] * 110)).past
    error = house.refuses(LengthExceeded, house.open([], [], []), past)
    assert str(error) == "batch_valid_length: 330 positions take 21 blocks and can never fit in 19"


def test_an_import_at_another_version_is_refused(house: House) -> None:
    past = house.export(house.open([1])).past
    error = house.refuses(Moved, house.open(), past, expected_version=1)
    assert isinstance(error, Moved)
    assert error.version == 0


# Waiting, failing, going


def test_an_import_waits_for_blocks_and_is_refused_after_the_deadline(house: House) -> None:
    source = house.open([1] * 150)
    past = house.export(source).past
    session = house.open()
    waiting = ImportPast(session, past)
    house.engine.submit(waiting)
    house.run()
    assert not waiting.future.done()
    house.clock.now += 31
    house.run()
    assert isinstance(waiting.future.exception(0), PoolExhausted)
    again = ImportPast(session, past)
    house.engine.submit(again)
    house.run()
    house.engine.delete_session(source)
    house.run()
    assert again.future.result(0).valid_length == [150]
    assert same(house.export(session).past, past)


def test_a_failing_import_is_taken_back(house: House) -> None:
    past = house.export(house.open([1] * 20)).past
    house.runner.poison = 20
    session = house.open()
    house.refuses(ModelFailed, session, past)
    house.runner.poison = None
    assert house.load(session, past).version == 1


@pytest.mark.parametrize("operation", ["export", "import"])
def test_deleting_while_it_runs_ends_it(house: House, operation: str) -> None:
    past = house.export(house.open([1] * 20)).past
    session = house.open([2] * 30) if operation == "export" else house.open()
    house.runner.on_transfer = lambda: house.engine.delete_session(session)
    transfer = ExportPast(session) if operation == "export" else ImportPast(session, past)
    house.engine.submit(transfer)
    house.run()
    assert isinstance(transfer.future.exception(0), SessionGone)
    assert house.engine.capacity().models[0].used == 2


def test_a_fork_while_an_import_runs_is_of_the_empty_session(house: House) -> None:
    past = house.export(house.open([1] * 20)).past
    session = house.open()
    children: list[SessionInfo] = []
    house.runner.on_transfer = lambda: children.extend(house.engine.fork(session))
    assert house.load(session, past).valid_length == [20]
    assert (children[0].valid_length, children[0].blocks) == ([0], 0)


def test_a_cancelled_import_is_dropped_if_it_has_not_run(house: House) -> None:
    session = house.open()
    operation = ImportPast(session, house.export(house.open([1])).past)
    house.engine.submit(operation)
    assert operation.future.cancel()
    house.run()
    assert house.engine.session(session).valid_length == [0]


def test_a_stopping_engine_takes_no_import(house: House) -> None:
    past, session = house.export(house.open([1])).past, house.open()
    house.engine.stop()
    for operation in (ImportPast(session, past), ExportPast(session)):
        with pytest.raises(EngineStopped):
            house.engine.submit(operation)
