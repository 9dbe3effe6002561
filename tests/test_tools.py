"""What is committed of the generated docs is what their generators write, and they leave nothing out."""

import re

import pytest

from service.settings import PREFIX, Settings
from tools.api_reference import document, kind
from tools.write import DOCS, PAGES

API = (DOCS / "api.md").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_what_is_written(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), f"docs/{name} is old: run `make reference`"


def test_every_operation_and_every_field_of_a_request_is_in_the_reference() -> None:
    schema = document()
    for path, methods in schema["paths"].items():
        for method in methods:
            assert API.count(f"### `{method.upper()} {path}`\n") == 1
    fields = schema["components"]["schemas"]["PrefillRequest"]["properties"]
    section = API.partition("### PrefillRequest\n")[2].partition("\n### ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == list(fields)


def test_every_link_of_the_reference_has_its_heading() -> None:
    headings = {each.lower() for each in re.findall(r"^#+ (\w+)$", API, flags=re.MULTILINE)}
    links = set(re.findall(r"\(#([^)]+)\)", API))
    assert len(links) > 40
    assert links <= headings


def test_every_setting_has_a_row() -> None:
    text = (DOCS / "configuration.md").read_text()
    rows = re.findall(rf"^\| `{PREFIX}(\w+)` \| (.+?) \|", text, flags=re.MULTILINE)
    assert [name.lower() for name, _ in rows] == list(Settings.model_fields)
    assert dict(rows)["PORT"] == "`8000`"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 0, "maximum": 5}, "integer (≥ 0, ≤ 5)"),
        ({"anyOf": [{"$ref": "#/components/schemas/Message"}, {"type": "null"}]}, "[Message](#message) or null"),
        ({"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}, "list of `a`, `b` (3 items at most)"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "object of number"),
        ({"type": "object", "additionalProperties": False}, "object"),
        ({}, "anything"),
    ],
)
def test_a_schema_in_words(schema: dict[str, object], words: str) -> None:
    assert kind(schema) == words
