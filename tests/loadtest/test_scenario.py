"""Scenarios: from files, with errors that name the field; lengths within their bounds; a model for each visit."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keypast.loadtest.plan import ModelInfo, choose_models
from keypast.loadtest.scenario import BUILTIN, Scenario, ScenarioError, Spread, draw_count, load_scenario
from keypast.schemas import ModelCard

TOML = """
about = "two kinds of users"
[[visits]]
kind = "chat"
weight = 3
turns = 2
prompt = {median = 20, high = 100}
[[visits]]
kind = "steps"
steps = {low = 1, high = 4}
"""


def test_a_file_is_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(TOML)
    scenario = load_scenario(str(path))
    assert (scenario.name, [visit.kind for visit in scenario.visits]) == ("two", ["chat", "steps"])
    again = tmp_path / "again.json"
    again.write_text(scenario.model_dump_json(exclude_unset=True))
    assert load_scenario(str(again)) == scenario


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("visits = []", "visits: List should have at least 1 item"),
        ('[[visits]]\nkind = "chat"\nturn = 3', "visits.0.chat.turn: Extra inputs"),
        ('[[visits]]\nkind = "chat"\nturns = {low = 3, high = 2}', "low 3 is above high 2"),
        ('[[visits]]\nkind = "tree"\nbranches = 50\nlevels = 2', "over 1024 leaves"),
        ('[[visits]]\nkind = "talk"', "visits.0: Input tag 'talk'"),
        ("[[visits", "not TOML"),
    ],
)
def test_an_error_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=r"bad\.toml") as caught:
        load_scenario(str(path))
    assert message in str(caught.value)


def test_no_such_scenario() -> None:
    with pytest.raises(ScenarioError, match="one of chat, stateless"):
        load_scenario("chatt")
    with pytest.raises(ScenarioError, match="No such file"):
        load_scenario("nowhere.toml")


@given(st.floats(0, 50), st.floats(0, 50), st.none() | st.floats(0.1, 1000), st.integers())
def test_a_length_is_within_its_bounds(low: float, more: float, median: float | None, seed: int) -> None:
    spread = Spread(low=low, high=low + more, median=median)
    drawn = random.Random(seed)
    for _ in range(20):
        assert low <= spread.draw(drawn) <= low + more
        assert draw_count(spread, drawn) >= 1


def test_weights_are_shares() -> None:
    visits = [{"kind": "request", "weight": 3}, {"kind": "chat"}]
    scenario = Scenario.model_validate({"name": "s", "visits": visits})
    drawn = random.Random(0)
    chosen = [scenario.choose(drawn) for _ in range(4000)]
    assert 0.72 < chosen.count(0) / 4000 < 0.78


def card(name: str, *inputs: tuple[str, list[int | str]]) -> ModelCard:
    infos = [{"name": name, "dtypes": ["float16", "float32"], "shape": shape} for name, shape in inputs]
    known = {"kind": "k", "max_length": 9, "dtype": "float32", "device": "cpu", "fingerprint": "f", "outputs": []}
    return ModelCard.model_validate({"id": name, "inputs": infos, **known})


def test_every_visit_has_a_model_that_fits() -> None:
    reads = ModelInfo.of(card("reads", ("token_ids", ["B", "n"])))
    wide: list[int | str] = ["B", "n", 8]
    attends = ModelInfo.of(card("attends", ("query", wide), ("key", wide), ("attention_mask", ["B", "n", "T"])))
    assert attends.tensors == {"query": ("float16", 8), "key": ("float16", 8)}
    assert (attends.masked, attends.tokens, reads.tokens) == (True, False, True)
    mixed = BUILTIN["mixed"]
    assert [model.id for model in choose_models(mixed, [reads, attends], None)] == [
        "reads",
        "reads",
        "attends",
        "reads",
    ]
    with pytest.raises(ScenarioError, match="steps needs a model of tensors, and loaded are reads"):
        choose_models(mixed, [reads], None)
    with pytest.raises(ScenarioError, match="chat needs 'other' as such a model"):
        choose_models(BUILTIN["chat"], [reads, attends], "other")


def test_the_guides_scenario_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "loadtest.md").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0])
    assert [visit.kind for visit in load_scenario(str(path)).visits] == ["chat", "steps"]
