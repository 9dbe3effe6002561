"""Generations that bring their prompt, and prompts that begin as other pasts do."""

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.batch import Generate, Once, Truncate
from engine.blocks import blocks_for
from engine.config import EngineConfig, Quota
from engine.errors import (
    InvalidInput,
    LengthExceeded,
    ModelFailed,
    PoolExhausted,
    QuotaExceeded,
    SessionNotFound,
    WrongState,
)
from engine.prefix import longest_prefix
from tests.engine.houses import Decoders, refusal
from tests.fakes import next_token

A, B = "a", "b"


@pytest.fixture
def house() -> Iterator[Decoders]:
    house = Decoders()
    yield house
    house.check()


def after(past: list[int], count: int) -> list[int]:
    """The tokens that follow."""
    tokens = list(past)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(past) :]


def generate(house: Decoders, session_id: str, prompt: list[int], tokens: int = 4, **options: Any) -> Any:
    inputs = {"token_ids": np.array([prompt], dtype=np.int64)} if prompt else {}
    operation = Generate(session_id, tokens, inputs=inputs, **options)
    house.engine.submit(operation)
    house.run()
    return operation.future.result(0)


# A generation with its prompt


@pytest.mark.parametrize("prompt", [[5], list(range(30))], ids=["one", "chunks"])
def test_a_prompt_and_its_first_token_are_one_turn(house: Decoders, prompt: list[int]) -> None:
    session = house.open()
    result = generate(house, session, prompt)
    assert result.token_ids == [after(prompt, 4)]
    assert (result.past_length, result.valid_length, result.version) == ([0], [len(prompt) + 4], 5)
    assert (result.effort.computed, result.effort.reused) == ([len(prompt) + 4], [0])
    again = generate(house, session, [7, 8], 2)
    assert again.token_ids == [after([*prompt, *result.token_ids[0], 7, 8], 2)]
    assert (again.past_length, again.effort.reused) == ([len(prompt) + 4], [len(prompt) + 4])


def test_it_may_begin_with_a_cut(house: Decoders) -> None:
    session = house.open()
    generate(house, session, [1, 2, 3, 4, 5])
    result = generate(house, session, [9], 3, at=2)
    assert result.token_ids == [after([1, 2, 9], 3)]
    assert (result.past_length, result.valid_length) == ([2], [6])


def test_what_cannot_be_leaves_the_session_as_it_was(house: Decoders) -> None:
    session = house.open(max_length=8)
    generate(house, session, [1, 2, 3], 1)
    before = house.engine.session(session)
    empty = house.open()
    wrong = {
        "long": (lambda: generate(house, session, [1] * 6, at=3), LengthExceeded),
        "cut": (lambda: generate(house, session, [1], at=5), InvalidInput),
        "id": (lambda: generate(house, session, [-1]), InvalidInput),
        "empty": (lambda: generate(house, empty, []), WrongState),
        "cut to nothing": (lambda: generate(house, session, [], at=0), WrongState),
    }
    for name, (call, error) in wrong.items():
        assert type(refusal(call)) is error, name
    now = house.engine.session(session)
    assert (now.version, now.valid_length, now.blocks) == (before.version, before.valid_length, before.blocks)


def test_one_that_fails_before_its_first_token_takes_its_prompt_back(house: Decoders) -> None:
    session = house.open(positions=3)
    prompt = [4, 5]
    house.runner.poison = next_token([0, 1, 2, *prompt])
    once = Once(b"d", "k")
    assert type(refusal(lambda: generate(house, session, prompt, once=once))) is ModelFailed
    assert house.engine.session(session).valid_length == [3]
    house.runner.poison = None
    result = generate(house, session, prompt, once=Once(b"d", "k"))
    assert (result.token_ids, result.past_length) == ([after([0, 1, 2, *prompt], 4)], [3])


def test_one_that_fails_later_keeps_what_it_has_and_is_known_again(house: Decoders) -> None:
    session = house.open()
    house.runner.poison = after([4, 5], 3)[2]
    operation = Generate(session, 9, inputs={"token_ids": np.array([[4, 5]])}, once=Once(b"d", "k"))
    house.engine.submit(operation)
    house.run()
    assert operation.partial is not None
    assert (operation.partial.token_ids, house.engine.session(session).valid_length) == ([after([4, 5], 2)], [4])
    again = generate(house, session, [4, 5], 9, once=Once(b"d", "k"))
    assert (again.token_ids, again.past_length) == ([after([4, 5], 2)], [0])


def test_the_newest_change_of_a_digest_is_found_by_it(house: Decoders) -> None:
    session = house.open()
    engine = house.engine
    assert engine.repeated(session, "", b"d") is None
    waiting = Generate(session, 2, inputs={"token_ids": np.array([[4]])}, once=Once(b"d", "k"))
    engine.submit(waiting)
    assert (engine.repeated(session, "", b"d"), engine.repeated(session, "", b"e")) == ("k", None)
    house.run()
    assert (engine.repeated(session, "", b"d"), engine.repeated(session, "", b"e")) == ("k", None)
    engine.submit(Truncate(session, 1, once=Once(b"e", "l")))
    assert (engine.repeated(session, "", b"d"), engine.repeated(session, "", b"e")) == (None, "l")
    house.append(session, 1)
    assert engine.repeated(session, "", b"e") is None, "the session has moved on"


# What a prompt begins with


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_the_longest_prefix(histories: list[list[int]], ids: list[int]) -> None:
    def common(history: list[int]) -> int:
        return next(
            (i for i, (x, y) in enumerate(zip(history, ids, strict=False)) if x != y), min(len(history), len(ids))
        )

    found, length = longest_prefix([array("q", history) for history in histories], ids)
    lengths = [common(history) for history in histories]
    assert length == max(lengths, default=0)
    assert found == (lengths.index(length) if length else None)


def like(house: Decoders, ids: list[int], tenant: str = A) -> tuple[str, int]:
    """A new session's id, and how much of these it has."""
    info = house.engine.create_session("decoder", tenant=tenant, like=ids)
    return info.id, info.valid_length[0]


def test_a_session_begins_as_the_longest_other_but_for_the_last_id(house: Decoders) -> None:
    session = house.open(A)
    generate(house, session, list(range(10)), 1, tenant=A)
    house.open(A, positions=6)
    for length, there in ((12, 10), (10, 9), (7, 6), (1, 0)):
        ids = list(range(length))
        begun, had = like(house, ids)
        assert had == there
        before = house.free()
        result = generate(house, begun, ids[had:], 3, tenant=A)
        assert (result.token_ids, result.effort.reused) == ([after(ids, 3)], [there])
        house.engine.end_session(begun, A, keep=False)
        assert house.free() >= before
    other, had = like(house, [0, 1, 2, 50, 51])
    assert (had, house.engine.session(other, A).shared_blocks) == (3, 1)
    assert like(house, list(range(10)), B)[1] == 0, "another tenant's are nobody's"
    assert house.engine.begins_with(session, A, [*range(4), 50]) == 4


def test_what_a_session_that_ends_had_is_there_for_the_next(house: Decoders) -> None:
    session, _ = like(house, [1, 2, 3, 4, 5])
    reply = generate(house, session, [1, 2, 3, 4, 5], 3, tenant=A).token_ids[0]
    house.engine.end_session(session, A, keep=True)
    assert house.engine.sessions(A) == []
    assert type(refusal(lambda: house.engine.session(session, A))) is SessionNotFound
    assert house.free() == 24, "whoever wants them has them"
    ids = [1, 2, 3, 4, 5, *reply, 6, 7]
    begun, had = like(house, ids)
    assert had == 8
    assert generate(house, begun, ids[had:], 3, tenant=A).token_ids == [after(ids, 3)]
    assert like(house, ids, B)[1] == 0
    house.engine.end_session(begun, A, keep=True)
    assert like(house, [*ids, 1])[1] == 10, "the shorter one went, the longer one is there"


def test_a_past_that_is_kept_gives_way_at_once_to_whoever_wants_blocks(house: Decoders) -> None:
    for tenant, first in ((A, 1), (A, 2), (B, 3)):
        session, _ = like(house, [first] * 20, tenant)
        generate(house, session, [first] * 20, 4, tenant=tenant)
        house.engine.end_session(session, tenant, keep=True)
    capacity = house.engine.capacity(A).models[0]
    assert (capacity.free, capacity.used, capacity.own, capacity.shared) == (24, 0, 0, 0)
    assert capacity.available == 24
    house.open(B, positions=30)
    assert like(house, [2] * 20)[1] == 19
    assert like(house, [3] * 20, B)[1] == 0, "its own go first"
    for info in house.engine.sessions(A):
        house.engine.delete_session(info.id, A)
    house.open(B, positions=60)
    assert like(house, [1] * 20)[1] == 0


def test_a_quota_of_blocks_is_not_used_up_by_what_is_kept() -> None:
    house = Decoders(quotas={A: Quota(blocks=6)})
    for first in (1, 2, 3):
        session, _ = like(house, [first] * 20)
        assert len(generate(house, session, [first] * 20, 4, tenant=A).token_ids[0]) == 4
        house.engine.end_session(session, A, keep=True)
    assert house.engine.capacity(A).models[0].available == 6
    assert like(house, [3] * 20)[1] == 19


def test_what_is_deleted_is_kept_for_nobody(house: Decoders) -> None:
    session = house.open(A, positions=8)
    temporary, had = like(house, [*range(8), 50])
    generate(house, temporary, [50], 2, tenant=A)
    house.engine.end_session(temporary, A, keep=True)
    assert had == 8
    receipt = house.engine.delete_session(session, A)
    assert (receipt.blocks_freed, receipt.blocks_still_shared) == (2, 0)
    house.run()
    assert like(house, list(range(9)))[1] == 0
    assert house.free() == 24


def test_so_many_are_kept_and_what_was_used_stays() -> None:
    house = Decoders(prefixes=2)
    for first in (1, 2, 1, 3):
        session, had = like(house, [first] * 5)
        generate(house, session, [first] * (5 - had), 1, tenant=A)
        house.engine.end_session(session, A, keep=True)
    probed = {first: like(house, [first] * 5)[1] for first in (1, 2, 3)}
    assert probed == {1: 4, 2: 0, 3: 4}
    assert EngineConfig().prefixes > 0


def test_one_that_runs_or_has_nothing_is_not_kept(house: Decoders) -> None:
    empty = house.open(A)
    house.engine.end_session(empty, A, keep=True)
    running = house.open(A)
    house.submit(running, 20, A)
    house.engine.run_once()
    house.engine.end_session(running, A, keep=True)
    house.run()
    house.engine.end_session(running, A, keep=True)  # gone already
    assert like(house, list(range(20)))[1] == 0


PROMPTS = st.lists(st.integers(1, 2), max_size=14)


class Prompts(RuleBasedStateMachine):
    """Sessions that begin as others do, end, and are kept, in a pool often too small. What each is given is what
    its own ids make, and nobody waits for blocks that are only kept."""

    def __init__(self) -> None:
        super().__init__()
        self.house = Decoders(blocks=12, zero_freed=True, quotas={B: Quota(blocks=7)})
        self.known: dict[str, tuple[str, list[int]]] = {}  # tenant and ids

    @rule(tenant=st.sampled_from([A, B]), ids=PROMPTS.filter(bool), tokens=st.integers(1, 6))
    def ask(self, tenant: str, ids: list[int], tokens: int) -> None:
        session, had = like(self.house, ids, tenant)
        self.known[session] = tenant, ids[:had]
        assert had < len(ids)
        self.go_on(session, ids[had:], tokens)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), ids=PROMPTS, tokens=st.integers(1, 6))
    def ask_again(self, data: st.DataObject, ids: list[int], tokens: int) -> None:
        session = data.draw(st.sampled_from(list(self.known)))
        if ids or self.known[session][1]:
            self.go_on(session, ids, tokens)

    def go_on(self, session: str, ids: list[int], tokens: int) -> None:
        tenant, before = self.known[session]
        whole = [*before, *ids]
        inputs = {"token_ids": np.array([ids], dtype=np.int64)} if ids else {}
        operation = Generate(session, tokens, tenant, inputs=inputs)
        self.house.engine.submit(operation)
        self.house.run()
        if not operation.future.done():  # there are no blocks: nothing that is kept stands in its way
            info = self.house.engine.session(session, tenant)
            (length,), there = info.valid_length, blocks_for(len(before), 4)
            needed = 1 if length > len(before) else blocks_for(len(whole), 4) - there + 1
            assert self.house.engine.capacity(tenant).models[0].available < needed
            self.house.later(10)
            self.house.run()
        error = operation.future.exception(0)
        length = self.house.engine.session(session, tenant).valid_length[0]
        made = [*whole, *after(whole, tokens)]
        if error is None:
            assert length == len(made)
        else:
            assert type(error) in (PoolExhausted, QuotaExceeded, LengthExceeded)
            assert length == len(before) or len(whole) < length < len(made)
        self.known[session] = tenant, made[:length]

    @precondition(lambda self: self.known)
    @rule(data=st.data(), how=st.sampled_from(["keep", "end", "delete"]))
    def end(self, data: st.DataObject, how: str) -> None:
        session = data.draw(st.sampled_from(list(self.known)))
        tenant, _ = self.known.pop(session)
        if how == "delete":
            self.house.engine.delete_session(session, tenant)
        else:
            self.house.engine.end_session(session, tenant, keep=how == "keep")

    @precondition(lambda self: self.known)
    @rule(data=st.data(), how=st.sampled_from(["cut", "fork"]))
    def change(self, data: st.DataObject, how: str) -> None:
        session = data.draw(st.sampled_from(list(self.known)))
        tenant, ids = self.known[session]
        at = data.draw(st.integers(0, len(ids)))
        if how == "cut":
            self.house.engine.submit(Truncate(session, at, tenant))
            self.known[session] = tenant, ids[:at]
        else:
            (child,) = self.house.engine.fork(session, tenant=tenant, at=at)
            self.known[child.id] = tenant, ids[:at]

    @invariant()
    def is_whole(self) -> None:
        self.house.run()
        self.house.check()
        if not self.known:
            assert self.house.free() == self.house.engine.capacity().models[0].available == 12
            assert self.house.engine.capacity(B).models[0].available == 7


TestPrompts = Prompts.TestCase
TestPrompts.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
