"""Chat templates are programs: what they are given, and what they are kept from."""

import time
from datetime import datetime
from typing import Any

import pytest

from engine import chat
from engine.chat import ChatTemplate
from engine.errors import InvalidInput

NAMES = {"bos_token": "<|end|>", "eos_token": "<|im_end|>"}


def rendered(source: str, **options: Any) -> str:
    return ChatTemplate(source, NAMES, **options).render([{"role": "user", "content": "hi"}])


def test_templates_have_what_transformers_gives_them() -> None:
    assert rendered("{{ bos_token }}{{ messages[0]['content'] }}") == "<|end|>hi"
    assert rendered("{{ {'é': '<'} | tojson }}") == '{"é": "<"}'
    assert rendered("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2026, 11, 5)) == "05 Nov 2026"
    assert rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert rendered("a{% generation %}b{% endgeneration %}c") == "abc"
    assert rendered("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert rendered("{{ tools is none and documents is none and add_generation_prompt }}") == "True"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ lipsum.__globals__.os }}", "access to attribute '__globals__'"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ messages[0].__init__.__globals__['sys'] }}", "access to attribute '__init__'"),
        ("{{ '{0.__class__.mro}'.format(messages) }}", "access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "__init__"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "grows too long"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_answer_not_a_crash(source: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        rendered(source)
    assert caught.value.field == "messages"
    assert message in str(caught.value)


def test_a_template_that_loops_in_silence_is_stopped() -> None:
    started = time.monotonic()
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% set k = j %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidInput, match="takes too long"):
        rendered(loops, seconds=0.1)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "x" * (chat.MAX_TEMPLATE + 1)])
def test_a_template_that_is_none_is_refused_when_the_model_is_loaded(source: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ChatTemplate(source, {})
    assert caught.value.field == "model"
