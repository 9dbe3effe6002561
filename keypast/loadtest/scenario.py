"""What users do, as data: a scenario is kinds of visits and their weights. From a TOML or JSON file, or built in."""

import random
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_CHILDREN = 64
MAX_LEAVES = 1024


class ScenarioError(ValueError):
    """The text names the field and what it takes."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(Strict):
    """A length drawn anew each time: even between `low` and `high`; with a `median`, log-normal around it (`sigma` is
    of the logarithm) and cut to them."""

    low: float = Field(default=0, ge=0)
    high: float = Field(ge=0)
    median: float | None = Field(default=None, gt=0)
    sigma: float = Field(default=0.6, ge=0, le=4)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        return self

    def draw(self, drawn: random.Random) -> float:
        if self.median is None:
            return drawn.uniform(self.low, self.high)
        return min(self.high, max(self.low, self.median * drawn.lognormvariate(0, self.sigma)))


Amount = Annotated[float, Field(ge=0)] | Spread
Children = Annotated[int, Field(ge=1, le=MAX_CHILDREN)]


def draw(amount: float | Spread, drawn: random.Random) -> float:
    return amount.draw(drawn) if isinstance(amount, Spread) else amount


def draw_count(amount: float | Spread, drawn: random.Random, least: int = 1) -> int:
    return max(least, round(draw(amount, drawn)))


class _Visit(Strict):
    weight: float = Field(default=1, gt=0, description="how often, relative to the scenario's other visits")
    model: str | None = Field(default=None, description="default: the first loaded one that fits")


class ChatVisit(_Visit):
    """A conversation: in each turn a message, and a reply that streams. With `session` the service keeps the past; else
    (and with any server but keypast) every turn sends the whole conversation again."""

    kind: Literal["chat"]
    session: bool = True
    turns: Amount = 3
    prompt: Amount = Field(default=40, description="words of a message, about a token each")
    output: Amount = Field(default=40, description="tokens of a reply; the end-of-text token is ignored")
    system: Amount = Field(default=0, description="words of a system message that all visits share")
    think: Amount = Field(default=0, description="seconds between a reply and the next message")


class StepsVisit(_Visit):
    """A session that the client drives: one prefill, then steps of one position each. Of an attention layer these are
    tensors, of a decoder tokens, each step's drawn by the one before. `think` is before each step."""

    kind: Literal["steps"]
    takes: Literal["tensors", "tokens"] = "tensors"
    prompt: Amount = 64
    steps: Amount = 32
    think: Amount = 0


class TreeVisit(_Visit):
    """A session, forked into `branches` children, each of which does `steps` and is forked again, `levels` deep.
    Siblings work at the same time."""

    kind: Literal["tree"]
    takes: Literal["tensors", "tokens"] = "tokens"
    prompt: Amount = 64
    branches: Children = 3
    levels: Annotated[int, Field(ge=1, le=8)] = 2
    steps: Amount = 4

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.branches**self.levels > MAX_LEAVES:
            raise ValueError(f"{self.branches} branches on {self.levels} levels are over {MAX_LEAVES} leaves")
        return self


class RequestVisit(_Visit):
    """One plain HTTP request, of any server."""

    kind: Literal["request"]
    method: str = Field(default="GET", pattern="^[A-Z]+$")
    path: str = Field(default="/livez", pattern="^/")
    body: str = ""


Visit = ChatVisit | StepsVisit | TreeVisit | RequestVisit


class Scenario(Strict):
    name: str = Field(min_length=1, max_length=64)
    about: str = ""
    visits: list[Annotated[Visit, Field(discriminator="kind")]] = Field(min_length=1)

    def choose(self, drawn: random.Random) -> int:
        """Which of `visits`."""
        return drawn.choices(range(len(self.visits)), [visit.weight for visit in self.visits])[0]


_TEXT: dict[str, Any] = {
    "prompt": {"median": 30, "sigma": 0.8, "low": 4, "high": 200},
    "output": {"median": 32, "sigma": 0.5, "low": 8, "high": 96},
}
_CHAT = {"kind": "chat", "turns": {"low": 2, "high": 4}, "think": {"low": 0.2, "high": 1}, **_TEXT}
_ATTENTION = {"kind": "steps", "prompt": {"low": 16, "high": 128}, "steps": {"low": 16, "high": 48}}
_TREE = {"kind": "tree", "prompt": {"low": 32, "high": 96}, "branches": 3, "levels": 2, "steps": {"low": 2, "high": 6}}

BUILTIN: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario.model_validate(each)
        for each in (
            {"name": "chat", "about": "conversations, each in a session; replies stream", "visits": [_CHAT]},
            {
                "name": "stateless",
                "about": "the same conversations without sessions: every turn sends all of it again",
                "visits": [{**_CHAT, "session": False}],
            },
            {"name": "attention", "about": "an attention layer: a prefill, then steps", "visits": [_ATTENTION]},
            {
                "name": "steps",
                "about": "a decoder that the client steps token by token",
                "visits": [{**_ATTENTION, "takes": "tokens"}],
            },
            {"name": "tree", "about": "sessions forked into trees; siblings step together", "visits": [_TREE]},
            {
                "name": "mixed",
                "about": "all of these at once",
                "visits": [
                    {**_CHAT, "weight": 4},
                    {**_CHAT, "session": False, "weight": 2},
                    {**_ATTENTION, "weight": 3},
                    _TREE,
                ],
            },
            {"name": "ping", "about": "GET /livez, to see what HTTP alone costs", "visits": [{"kind": "request"}]},
        )
    )
}


def load_scenario(name: str) -> Scenario:
    """A built-in one by its name, else a file's. Raises ScenarioError."""
    if name in BUILTIN:
        return BUILTIN[name]
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        raise ScenarioError(f"{name!r} is neither a .toml or .json file nor one of {', '.join(BUILTIN)}")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    try:
        if path.suffix == ".json":
            return Scenario.model_validate_json(text)
        return Scenario.model_validate({"name": path.stem[:64], **tomllib.loads(text)})
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{name}: not TOML: {error}") from None
    except ValidationError as error:
        raise ScenarioError(f"{name}: {first_error(error)}") from None


def first_error(error: ValidationError) -> str:
    """`visits.0.chat.turns: what is wrong`. Of a length that is neither of its two forms, as the one it looks like."""
    all_of_them = error.errors(include_url=False, include_input=False, include_context=False)
    found = next((each for each in all_of_them if each["type"] not in _OTHER_FORM), all_of_them[0])
    where = ".".join(str(part) for part in found["loc"] if part not in _FORMS)
    message = found["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


_OTHER_FORM = ("float_type", "model_type")
_FORMS = ("constrained-float", "Spread")
