"""What an import brings, and what the package calls public."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from pydantic import BaseModel

import keypast
from keypast import schemas

TORCH = ("torch", "transformers", "hdrh", "matplotlib")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("keypast.cli", (*TORCH, "fastapi", "uvicorn", "engine", "service")), ("service.server", TORCH)],
)
def test_an_import_is_light(module: str, heavy: tuple[str, ...]) -> None:
    """The command brings all of the client, whose package imports the rest of it."""
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_public_names() -> None:
    assert sorted(keypast.__all__) == keypast.__all__
    assert all(hasattr(keypast, name) for name in keypast.__all__)
    assert keypast.__version__ == version("keypast")


def models() -> list[type[BaseModel]]:
    found = [each for each in vars(schemas).values() if isinstance(each, type) and issubclass(each, BaseModel)]
    return [each for each in found if each.__module__ == schemas.__name__]


@pytest.mark.parametrize("model", models())
def test_examples_are_true(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    for example in schema.get("examples", []):
        model.model_validate(example)


def test_requests_refuse_what_they_do_not_know() -> None:
    requests = [each for each in models() if issubclass(each, schemas.Request)]
    assert all(each.model_config["extra"] == "forbid" and each.model_config["strict"] for each in requests)
    replies = [each for each in models() if issubclass(each, schemas.Reply)]
    assert all(each.model_config["extra"] == "ignore" for each in replies)
