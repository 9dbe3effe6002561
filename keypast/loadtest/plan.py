"""What a worker is told, and what it must know of the models: one JSON line."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from keypast.loadtest.arrival import Arrival
from keypast.loadtest.scenario import (
    ChatVisit,
    RequestVisit,
    Scenario,
    ScenarioError,
    Strict,
    Visit,
)
from keypast.loadtest.slo import Slo
from keypast.schemas import ModelCard

Target = Literal["keypast", "openai"]
TOKENS = "token_ids"  # the input of a model that reads text


class ModelInfo(Strict):
    """`tensors`: dtype and width of each input that has a row of numbers a position; none of a model of tokens."""

    id: str
    tokens: bool
    tensors: dict[str, tuple[str, int]] = Field(default_factory=dict)
    masked: bool = False

    @classmethod
    def of(cls, card: ModelCard) -> "ModelInfo":
        names = {info.name for info in card.inputs}
        tensors = {
            info.name: (info.dtypes[0], info.shape[2])
            for info in card.inputs
            if len(info.shape) == 3 and isinstance(info.shape[2], int)
        }
        return cls(id=card.id, tokens=TOKENS in names, tensors=tensors, masked="attention_mask" in names)

    @classmethod
    def named(cls, name: str) -> "ModelInfo":
        """Of another server, of which only the name is known."""
        return cls(id=name, tokens=True)


class Plan(Strict):
    """A whole run, and which share of it is meant. Seconds count from the start; what is due in [warmup, seconds) is
    measured. With a `count`, visits with a number from there on do not begin."""

    target: Target = "keypast"
    url: str
    headers: dict[str, str] = Field(default_factory=dict, repr=False)
    scenario: Scenario
    models: list[ModelInfo] = Field(default_factory=list, description="one a visit of the scenario")
    arrival: Arrival
    seconds: float = Field(gt=0)
    warmup: float = Field(default=0, ge=0)
    count: int | None = Field(default=None, ge=1)
    seed: int = 0
    timeout: float = Field(default=60, gt=0, description="seconds of one operation")
    connections: int = Field(default=1000, ge=1, description="of each worker")
    interval: float = Field(default=1, gt=0, description="seconds a point of the time series stands for")
    slo: Slo = Field(default_factory=Slo)
    check: int = Field(default=0, ge=0, description="visits to do again, of each worker")
    worker: int = 0
    workers: int = 1


def choose_models(scenario: Scenario, loaded: Iterable[ModelInfo], wanted: str | None) -> list[ModelInfo]:
    """One for each kind of visit: the named one, or the first that fits. Raises ScenarioError."""
    cards = list(loaded)
    return [_choose(visit, cards, visit.model or wanted) for visit in scenario.visits]


def _choose(visit: Visit, cards: list[ModelInfo], name: str | None) -> ModelInfo:
    if isinstance(visit, RequestVisit):
        return ModelInfo.named("")
    tokens = isinstance(visit, ChatVisit) or visit.takes == "tokens"
    for card in cards:
        if card.tokens == tokens and name in (None, card.id):
            return card
    loaded = ", ".join(card.id for card in cards) or "none"
    what = f"a model of {'tokens' if tokens else 'tensors'}" if name is None else f"{name!r} as such a model"
    raise ScenarioError(f"a visit of kind {visit.kind} needs {what}, and loaded are {loaded}")
