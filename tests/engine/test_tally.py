"""What an engine counts of its work, and what a clock says of it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Append, ExportPast, Generate, ImportPast, Operation, Sample, Truncate, Want
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ModelFailed
from engine.tally import SECONDS, Figures, Histogram
from tests.fakes import ATTENTION, DECODER, FakeClock, FakeRunner


class House:
    """Each batch takes `seconds` of the clock."""

    def __init__(self, blocks: int = 20, **config: Any) -> None:
        self.runner, self.layer = FakeRunner(DECODER, blocks), FakeRunner(ATTENTION, blocks)
        self.clock = FakeClock()
        self.engine = Engine([self.runner, self.layer], EngineConfig(**{"gather_share": 0.0, **config}), self.clock)
        self.seconds = 0.0
        self.runner.before_run = self.layer.before_run = lambda _: self.tick(self.seconds)
        self.runner.on_transfer = lambda: self.tick(self.seconds)

    def tick(self, seconds: float) -> None:
        self.clock.now += seconds

    def run(self) -> None:
        while self.engine.run_once():
            self.engine.check()

    def finish(self, operation: Operation) -> None:
        self.engine.submit(operation)
        self.run()
        operation.future.result(0)

    def append(self, session: str, *tokens: int, **options: Any) -> None:
        self.finish(Append(session, {"token_ids": np.array([tokens])}, **options))

    @property
    def figures(self) -> Figures:
        return self.engine.figures()[0]


@pytest.fixture
def house() -> House:
    return House()


def values(histogram: Histogram) -> tuple[int, float]:
    """How many, and their sum, to the microsecond."""
    return sum(histogram.counts), round(histogram.total, 6)


@given(st.lists(st.floats(-1, 100) | st.sampled_from(SECONDS), max_size=30))
def test_a_histogram_counts_what_is_at_most_its_bound(given: list[float]) -> None:
    histogram = Histogram()
    for value in given:
        histogram.add(value)
    clipped = [max(0.0, value) for value in given]
    for place, bound in enumerate(SECONDS):
        assert sum(histogram.counts[: place + 1]) == sum(value <= bound for value in clipped)
    assert sum(histogram.counts) == len(given)
    assert histogram.total == pytest.approx(sum(clipped))


def test_a_copy_stays_as_it_was(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    before = house.figures
    house.append("a", 1, 2)
    assert before.tally.done["prefill"].positions == 0
    assert sum(before.tally.ran["prefill"].rows.counts) == 0
    assert before.events["committed"] == 0
    assert house.figures.tally.done["prefill"].positions == 2


def test_an_append_waits_and_runs(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    append = Append("a", {"token_ids": np.array([[1, 2, 3]])})
    house.seconds = 4.0
    house.engine.submit(append)
    house.tick(2.0)
    house.run()
    done = house.figures.tally.done["prefill"]
    assert values(done.queued) == (1, 2.0)
    assert values(done.seconds) == (1, 6.0)


def test_operations_count_what_they_appended_and_what_they_found(house: House) -> None:
    engine = house.engine
    engine.create_session("decoder", session_id="a")
    house.append("a", 1, 2, 3, 4, 5)
    house.append("a", 6, step=True)
    house.append("a", 7, 8, keep=False)
    house.finish(Generate("a", 3))
    export = ExportPast("a")
    house.finish(export)
    engine.create_session("decoder", session_id="b")
    house.finish(ImportPast("b", export.future.result(0).past))
    found = {name: (done.positions, done.reused) for name, done in house.figures.tally.done.items()}
    assert found == {
        "prefill": (5, 0),
        "step": (1, 5),
        "score": (2, 6),
        "generate": (3, 6),
        "export": (9, 0),
        "import": (9, 0),
    }
    assert all(values(done.seconds)[0] == 1 for done in house.figures.tally.done.values())


def test_what_is_computed_again_is_not_reused(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    house.append("a", 1, 2, 3, 4)
    house.finish(Truncate("a", 3))
    house.finish(Generate("a", 1))  # of a past without its tail: the last position is replayed
    assert house.runner.replayed == 1
    assert house.figures.tally.done["generate"].reused == 2


def test_the_times_of_a_generation(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    house.append("a", 1, 2)
    house.seconds = 0.3
    house.finish(Generate("a", 4))
    tally = house.figures.tally
    assert values(tally.first_token["generate"]) == (1, 0.6)  # one batch draws it, the next commits it
    assert values(tally.token_gap) == (3, 0.9)
    assert values(tally.token_mean) == (1, 0.3)
    assert values(tally.done["generate"].seconds) == (1, 1.5)


def test_a_generations_prompt_is_a_prefills(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    house.seconds = 0.5
    house.finish(Generate("a", 2, inputs={"token_ids": np.array([[1, 2, 3]])}))
    tally = house.figures.tally
    assert {name: done.positions for name, done in tally.done.items() if done.positions} == {
        "prefill": 3,
        "generate": 2,
    }
    assert values(tally.first_token["generate"]) == (1, 1.0)
    assert {phase: values(ran.rows)[0] for phase, ran in tally.ran.items()} == {"prefill": 1, "step": 2, "transfer": 0}
    assert values(tally.done["prefill"].seconds)[0] == 0


def test_a_prefill_that_draws_gives_a_first_token(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    house.seconds = 0.5
    house.append("a", 1, 2)
    house.append("a", 3, want=Want(sample=Sample()))
    house.append("a", 4, want=Want(sample=Sample()), step=True)
    assert values(house.figures.tally.first_token["prefill"]) == (1, 0.5)


def test_batches_by_phase_and_rows(house: House) -> None:
    for name in ("a", "b", "c"):
        house.engine.create_session("decoder", session_id=name)
        house.append(name, 1, 2)
    steps = [Append(name, {"token_ids": np.array([[3]])}, step=True) for name in ("a", "b", "c")]
    assert house.engine.submit_all(steps) == [None, None, None]
    house.run()
    house.finish(ExportPast("a"))
    ran = house.figures.tally.ran
    assert {phase: values(each.rows) for phase, each in ran.items()} == {
        "prefill": (3, 3.0),
        "step": (1, 3.0),
        "transfer": (1, 1.0),
    }
    assert {phase: values(each.seconds)[0] for phase, each in ran.items()} == {"prefill": 3, "step": 1, "transfer": 1}


def test_a_layer_that_is_asked_many_queries_is_no_step(house: House) -> None:
    house.engine.create_session("attention", session_id="x")
    x, mask = np.ones((1, 3, 4), np.float32), np.ones((1, 3, 3), np.float32)
    house.finish(Append("x", {"query": x, "key": x, "value": x, "attention_mask": mask}))
    house.finish(Append("x", {"query": x, "attention_mask": mask}))
    house.finish(Append("x", {"query": x[:, :1]}, step=True))
    tally = house.engine.figures()[1].tally
    assert {phase: values(ran.rows)[0] for phase, ran in tally.ran.items()} == {"prefill": 2, "step": 1, "transfer": 0}
    assert (tally.done["prefill"].positions, tally.done["prefill"].reused) == (3, 3)


def test_what_fails_is_not_done(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    house.append("a", 1)
    house.runner.poison = 9
    failing = Append("a", {"token_ids": np.array([[9]])})
    house.engine.submit(failing)
    house.run()
    with pytest.raises(ModelFailed):
        failing.future.result(0)
    done = house.figures.tally.done["prefill"]
    assert (values(done.seconds)[0], done.positions) == (1, 1)


def test_what_is_held_is_what_the_capacity_says_also_while_it_runs(house: House) -> None:
    engine = house.engine
    engine.create_session("decoder", session_id="a")
    house.append("a", *range(20))
    engine.fork("a")
    seen: list[Figures] = []
    house.runner.before_run = lambda _: seen.append(house.figures)
    first, second = (Append("a", {"token_ids": np.array([tokens])}) for tokens in ([1] * 40, [2]))
    engine.submit(first)
    engine.submit(second)
    waits = house.figures
    assert (waits.running, waits.waiting, dict(waits.sessions)) == (0, 2, {"idle": 1, "running": 1})
    engine.run_once()
    (runs,) = seen
    assert (runs.running, runs.waiting, dict(runs.sessions)) == (1, 1, {"idle": 1, "running": 1})
    assert runs.capacity.reserved == 2, "60 positions take 4 blocks; 2 are of the 20 that are committed"
    house.runner.before_run = bool
    house.run()
    rests = house.figures
    assert (rests.running, rests.waiting, dict(rests.sessions)) == (0, 0, {"idle": 2, "running": 0})
    for figures in (waits, runs, rests):
        pool = figures.capacity
        assert pool.free + pool.used == pool.total
    assert rests.capacity == engine.capacity().models[0]


def test_a_generation_runs_between_its_tokens(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    house.append("a", 1)
    house.engine.submit(Generate("a", 3))
    house.engine.run_once()
    house.engine.run_once()
    assert (house.figures.running, house.figures.waiting) == (1, 0)
    house.run()


def test_sessions_are_counted_by_what_happened_to_them() -> None:
    house = House(blocks=5, evict="lru")
    engine = house.engine
    for name in ("a", "b"):
        engine.create_session("decoder", session_id=name)
        house.append(name, *range(20))
        house.tick(1.0)
    engine.create_session("decoder", session_id="c", ttl_seconds=5.0)
    house.append("c", *range(20))  # 2 blocks of 4, which two others have
    engine.fork("c")
    engine.delete_session("b")
    house.tick(10.0)
    assert len(engine.sessions()) == 0
    events = house.figures.events
    assert {kind: count for kind, count in events.items() if count} == {
        "created": 3,
        "forked": 1,
        "committed": 3,
        "evicted": 1,
        "deleted": 1,
        "expired": 2,
    }
    assert dict(house.figures.sessions) == {"idle": 0, "running": 0}
    assert not any(house.engine.figures()[1].events.values()), "the other model's"
