"""A model that a team of two processes holds is the whole one. The test's own process is rank 0."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from engine.batch import ExportPast, Generate, ImportPast, Sample, Truncate, Want
from engine.errors import InvalidInput
from engine.loading import LoadOptions, load_model
from engine.runner import Plan
from engine.team import Team
from tests.engine.models import CACHE, Served, reference_model
from tests.engine.test_attention_model import causal

FAMILIES = ("llama-tied-biased", "qwen3", "gpt2")
LAYER = "attention:hidden=24,heads=4"
EVERY_OPTION = "attention:hidden=24,heads=4,kv_heads=2,kdim=24,bias=0,add_bias_kv=1,add_zero_attn=1,rotary=100"
OPTIONS = LoadOptions(CACHE, kv_memory=8 << 20, dtype="float32", kv_dtype="float32")
ALL = Want(logits="all")
Pair = Callable[..., tuple[Served, Served]]


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {"layer": LAYER, "every option": EVERY_OPTION}
    for family in FAMILIES:
        found[family] = str(tmp_path_factory.mktemp(family))
        reference_model(family).save_pretrained(found[family])
    return found


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(2, seconds=20)
    yield team
    team.close()


@pytest.fixture
def pair(team: Team, specs: dict[str, str]) -> Pair:
    """(cut, whole) of a model."""

    def pair(name: str, **options: Any) -> tuple[Served, Served]:
        chosen = dataclasses.replace(OPTIONS, **options)
        cut, whole = team.load(name, specs[name], chosen, print), load_model(name, specs[name], chosen, print)
        assert (cut.runner.spec, cut.runner.blocks) == (whole.runner.spec, whole.runner.blocks)
        return Served(cut.runner, token_budget=32), Served(whole.runner, token_budget=32)

    return pair


def both(served: tuple[Served, Served], act: Callable[[Served], Any]) -> tuple[Any, Any]:
    return act(served[0]), act(served[1])


def inputs(batch: int, n: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=(batch, n, 24)).astype(np.float32) for name in ("query", "key", "value")}


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_decoder_gives_the_same_logits(pair: Pair, family: str, backend: str) -> None:
    """Ragged prefills in chunks, a step, a fork, and a replayed position."""

    def act(served: Served) -> list[np.ndarray]:
        session = served.open(batch_size=2)
        rows = [list(range(40)), list(range(50, 53)) + [0] * 37]
        given = [served.tokens(session, *rows, batch_valid_length=[40, 3], want=ALL).outputs["logits"]]
        given.append(served.tokens(session, [7], [8], want=ALL, step=True).outputs["logits"])
        child = served.engine.fork(session, at=[17, 2])[0].id
        given.append(np.array(served.finish(Generate(child, 3)).token_ids))
        given.append(served.tokens(child, [9], [10], want=ALL).outputs["logits"])
        given.append(served.tokens(session, [11], [12], want=ALL).outputs["logits"])
        return given

    for cut, whole in zip(*both(pair(family, backend=backend), act), strict=True):
        np.testing.assert_allclose(cut, whole, atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packed_low_precision_stays_near_the_whole(pair: Pair, dtype: str) -> None:
    served = pair("llama-tied-biased", dtype=dtype, kv_dtype="float16")
    cut, whole = both(served, lambda one: one.logits(one.open(), list(range(60))).numpy())
    assert np.abs(cut - whole).max() < {"bfloat16": 0.05, "float16": 0.005}[dtype] * (whole.max() - whole.min())


def test_8_bit_linears_stay_near_the_whole(pair: Pair) -> None:
    """A cut row's groups of inputs begin at the cut, so that its weights are rounded by other scales."""
    served = pair("llama-tied-biased", quantize="int8")
    cut, whole = both(served, lambda one: one.logits(one.open(), list(range(60))).numpy())
    assert 0 < np.abs(cut - whole).max() < 0.02 * (whole.max() - whole.min())


def test_a_deleted_session_leaves_nothing_on_any_rank(pair: Pair) -> None:
    served, _ = pair("qwen3", backend="sdpa")
    session = served.open()
    served.logits(session, list(range(40)))
    blocks = [[1, 2, 3]]
    assert all(head.any() for array in served.runner.read_past(blocks, [40]).values() for head in array[0])
    served.engine.delete_session(session)
    while served.engine.run_once():
        served.engine.check()
    assert not any(array.any() for array in served.runner.read_past(blocks, [48]).values())  # to the blocks' end


def test_a_cut_decoder_generates_the_same_text(pair: Pair) -> None:
    def act(served: Served) -> list[Any]:
        session = served.open(batch_size=2)
        served.tokens(session, [1, 2, 3], [4, 5, 6])
        greedy = served.finish(Generate(session, 20)).token_ids
        served.finish(Truncate(session, 9))
        drawn = served.finish(Generate(session, 20, sample=Sample(temperature=0.8, top_p=0.9, seed=5))).token_ids
        return [greedy, drawn]

    cut, whole = both(pair("llama-tied-biased"), act)
    assert cut == whole


@pytest.mark.parametrize("name", ["layer", "every option"])
def test_a_cut_layer_gives_the_same_outputs_and_every_heads_weights(pair: Pair, name: str) -> None:
    def act(served: Served) -> list[dict[str, Any]]:
        session = served.open(batch_size=2)
        mask = causal(2, 7)
        mask[0, 5, 2] = 0
        want = Want(need_weights=True, average_attn_weights=False)
        given = [served.append(session, {**inputs(2, 7, 0), "attention_mask": mask}, want).outputs]
        served.finish(Truncate(session, 5))
        given.append(served.append(session, inputs(2, 1, 1), Want(need_weights=True), step=True).outputs)
        return given

    for cut, whole in zip(*both(pair(name), act), strict=True):
        assert cut.keys() == whole.keys()
        for name, array in whole.items():
            np.testing.assert_allclose(cut[name], array, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["llama-tied-biased", "layer"])
def test_a_past_leaves_a_cut_model_whole_and_comes_back(pair: Pair, name: str) -> None:
    """Out of the cut one, into the whole one, and the other way round: each then steps as the one it came from."""
    pasts, outputs = [], []
    served = pair(name)

    def step(one: Served, session: str) -> np.ndarray:
        if name == "layer":
            return np.asarray(one.append(session, inputs(1, 1, 1), step=True).outputs["attn_out"])
        return np.asarray(one.tokens(session, [3], want=ALL, step=True).outputs["logits"])

    for one in served:
        session = one.open()
        if name == "layer":
            one.append(session, {**inputs(1, 20, 0), "attention_mask": causal(1, 20)})
        else:
            one.tokens(session, list(range(20)))
        pasts.append(one.finish(ExportPast(session)).past)
        outputs.append(step(one, session))
    for array, cut in pasts[0].arrays.items():
        np.testing.assert_allclose(cut, pasts[1].arrays[array], atol=1e-5, err_msg=array)
    for one, past, expected in zip(served, reversed(pasts), reversed(outputs), strict=True):
        session = one.open()
        one.finish(ImportPast(session, past))
        np.testing.assert_allclose(step(one, session), expected, atol=1e-4)


def test_freed_blocks_are_zeroed_on_every_rank(pair: Pair) -> None:
    served, _ = pair("layer")
    served.append(served.open(), {**inputs(1, 20, 0), "attention_mask": causal(1, 20)})
    tables, lengths = [list(range(1, served.runner.blocks))], [16 * (served.runner.blocks - 1)]
    assert all(np.all(bits.any(axis=(0, 2, 3))) for bits in pool_bits(served, tables, lengths)), "every head wrote"
    served.runner.zero(tables[0])
    assert not any(bits.any() for bits in pool_bits(served, tables, lengths))


def pool_bits(served: Served, tables: list[list[int]], lengths: list[int]) -> list[np.ndarray]:
    """The past as bytes: what nothing has been written to may hold bits that are no numbers."""
    arrays = served.runner.read_past(tables, lengths).values()
    return [np.ascontiguousarray(array).view(np.uint8) for array in arrays]


def bad_plan(served: Served) -> Plan:
    """A token id that is not in the vocabulary, which admission would have refused."""
    row = np.array([1], np.int32)
    attention: dict[str, np.ndarray] = {
        "query_start": np.array([0, 1], np.int32),
        "past_length": row - 1,
        "present_length": row,
        "block_table": row[None],
        "positions": np.zeros(1, np.int64),
        "slots": np.full(1, 16),
    }
    return Plan([], attention, {"token_ids": np.array([10**6])}, need_weights=False, steps=True)


def test_what_fails_on_every_rank_alike_fails_alone(team: Team, pair: Pair) -> None:
    served, _ = pair("gpt2")
    before = served.logits(served.open(), [1, 2, 3])
    plan = bad_plan(served)
    for _ in range(2):
        with pytest.raises(IndexError), team.together("gpt2", "execute", plan):
            served.runner.execute(plan)
    np.testing.assert_array_equal(served.logits(served.open(), [1, 2, 3]), before)


def test_heads_that_two_ranks_cannot_share_are_refused_and_the_team_stays(team: Team, pair: Pair) -> None:
    with pytest.raises(InvalidInput, match="model odd has heads 3, kv_heads 3; 2 does not divide heads and kv_heads"):
        team.load("odd", "attention:hidden=24,heads=3", OPTIONS, print)
    served, _ = pair("gpt2")
    assert served.logits(served.open(), [1]).shape == (1, 89)
