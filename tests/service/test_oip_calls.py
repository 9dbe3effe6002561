"""The Open Inference Protocol: outputs and their forms, texts, and calls that bring their own past."""

import asyncio
import gzip
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keypast.oip import HEADER, strings
from keypast.wire import Array
from service.bodies import coding_asked
from tests.service.conftest import Running, until
from tests.service.fakes import KINDS, POISON, H, Kind
from tests.service.inference import asked, post, refused, sequence, served, told

pytestmark = pytest.mark.anyio

ATTENTION = KINDS["attention"]


# ---- outputs ---------------------------------------------------------------------------------------------------------


async def test_outputs_are_given_as_they_are_asked_for(running: Running) -> None:
    outputs = [
        {"name": "valid_length"},
        {"name": "attn_weights", "parameters": {"binary_data": True}},
        {"name": "attn_out", "parameters": {"binary_data": False}},
    ]
    answer = told(await post(running, "echo", ATTENTION.inputs(2, 0, 1, False), outputs=outputs))
    assert list(answer.outputs) == ["valid_length", "attn_weights", "attn_out"]
    assert ["data" in tensor for tensor in answer.head["outputs"]] == [True, False, True]
    assert (answer.outputs["valid_length"].tolist(), answer.outputs["attn_weights"].tolist()) == ([2], [[[1, 1]] * 2])
    plain = told(await post(running, "echo", ATTENTION.inputs(2, 0, 1, False)))
    assert (list(plain.outputs), HEADER in plain.reply.headers) == (["attn_out"], False)
    assert plain.reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("outputs", "name"),
    [
        ([{"name": "nobody"}], "nobody"),
        ([{"name": "attn_out"}, {"name": "attn_out"}], "attn_out"),
        ([{"name": "attn_out", "parameters": {"classification": 3}}], "attn_out"),
        ([{"name": "attn_out", "parameters": {"binary_data": "yes"}}], "binary_data"),
        ([{"name": "attn_out"}] * 65, "outputs"),
    ],
)
async def test_outputs_that_are_wrong(running: Running, outputs: Any, name: str) -> None:
    reply = await post(running, "echo", ATTENTION.inputs(2, 0, 1, False), outputs=outputs)
    assert refused(reply, 422).startswith(name)


async def test_texts_in_and_out(running: Running) -> None:
    """Ragged rows; the letter after each text's last."""
    texts = {"text": strings(["abc", "x"])}
    outputs = [{"name": "text"}, {"name": "next_token"}, {"name": "valid_length"}]
    for binary in (True, False):
        answer = told(await post(running, "letters", texts, binary=binary, outputs=outputs))
        assert answer.outputs["text"].tolist() == ["d", "y"]
        assert answer.outputs["next_token"].tolist() == [ord("d"), ord("y")]
        assert answer.outputs["valid_length"].tolist() == [3, 1]
    told(await post(running, "letters", texts, outputs=outputs, **sequence("chat", start=True)))
    more = told(await post(running, "letters", {"text": strings(["d", "yz"])}, outputs=outputs, **sequence("chat")))
    assert (more.outputs["text"].tolist(), more.outputs["valid_length"].tolist()) == (["e", "{"], [4, 3])
    sampled = await post(running, "letters", texts, outputs=outputs, parameters={"temperature": 0.5, "seed": 77})
    assert (told(sampled).outputs["text"].tolist(), running.fakes.decoder.seeds[-1]) == (["d", "y"], 77)


async def test_texts_that_are_wrong(running: Running) -> None:
    both = {"text": strings(["a"]), "token_ids": np.ones((1, 1), int)}
    refused(await post(running, "letters", both), 422, "token_ids: comes with text")
    bad = np.array([b"\xff"], dtype=object)
    refused(await post(running, "letters", {"text": bad}), 422, "text: is not UTF-8")
    refused(await post(running, "letters", {"text": np.ones((1, 1), np.int32)}), 422, "text: must be BYTES")
    refused(await post(running, "letters", {"text": strings([""])}), 422, "text")
    refused(await post(running, "echo", {"text": strings(["a"])}), 422, "text: model echo takes query")
    refused(await post(running, "letters", {"token_ids": strings(["a"])}), 422, "token_ids")
    lengths = {"batch_valid_length": np.array([1.0], np.float32)}
    refused(await post(running, "letters", {"text": strings(["a"]), **lengths}), 422, "batch_valid_length")
    refused(await post(running, "letters", {"batch_valid_length": np.array([1])}), 422, "token_ids: is required")
    parameters = {"temperature": -1}
    refused(await post(running, "letters", {"text": strings(["a"])}, parameters=parameters), 422, "sample.temperature")
    assert running.fakes.engine.sessions() == []


async def test_ids_of_32_bits(running: Running) -> None:
    answer = told(await post(running, "letters", {"token_ids": np.array([[97]], np.int32)}))
    assert answer.outputs["next_token"].tolist() == [98]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_packed_request_and_a_packed_reply(running: Running, kind: Kind, coding: str) -> None:
    """The header counts the JSON as it is unpacked, both ways; a refusal is never packed."""
    pack: Callable[[bytes], bytes] = gzip.compress if coding == "gzip" else zlib.compress
    content, headers = asked(kind.inputs(2, 0, 1, False), parameters={"binary_data_output": True})
    path = f"/v2/models/{kind.model}/infer"
    plain = await running.client.post(path, content=content, headers=headers)
    asks = {**headers, "content-encoding": coding, "accept-encoding": coding}
    reply = await running.client.post(path, content=pack(content), headers=asks)
    assert (reply.headers["content-encoding"], reply.headers[HEADER]) == (coding, plain.headers[HEADER])
    assert reply.content == plain.content, "httpx unpacks it"
    assert int(reply.headers["content-length"]) != len(plain.content)
    broken = await running.client.post(path, content=pack(content)[:-5], headers=asks)
    assert "content-encoding" not in broken.headers
    refused(broken, 400, coding)


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("GZIP;q=0.5, identity", "gzip"),
        ("gzip, br;q=0", "gzip"),
        ("gzip, deflate", None),
        ("gzip, deflate, br", None),
        ("gzip;q=0", None),
        ("br", None),
        ("*", None),
        ("", None),
        (",,;", None),
    ],
)
def test_what_asks_for_a_packed_reply(accept: str, coding: str | None) -> None:
    assert coding_asked(accept) == coding


# ---- a past of its own -----------------------------------------------------------------------------------------------


async def call(running: Running, arrays: Mapping[str, Array], **fields: Any) -> dict[str, Array]:
    """With nothing left behind."""
    before = running.state()
    answer = told(await post(running, "echo", arrays, parameters={"binary_data_output": True}, **fields))
    assert running.state() == before
    return answer.outputs


def empty(rows: int, slots: int) -> dict[str, Array]:
    key, value = np.zeros((rows, 1, H, slots), np.float16), np.zeros((rows, 1, slots, H), np.float16)
    return {"key_past": key, "value_past": value}


def valued(rows: int, first: float, n: int, past: int, **more: Array) -> dict[str, Array]:
    """Positions whose values are `first`, first + 1, ..; the same in every row."""
    arrays = ATTENTION.inputs(n, past, rows, False)
    arrays["value"] = np.broadcast_to(np.arange(first, first + n, dtype=np.float32)[:, None], (rows, n, H)).copy()
    return arrays | more


async def test_a_past_grows_call_by_call(running: Running) -> None:
    """The outputs are those of a sequence; the present of one call is the past of the next."""
    past = empty(1, 0)
    total = 0
    for at, n in enumerate((3, 1, 2)):
        arrays = valued(1, total, n, total)
        outputs = await call(running, arrays | past)
        expected = told(await post(running, "echo", arrays, **sequence(9, start=at == 0))).outputs["attn_out"]
        assert outputs["attn_out"].tobytes() == expected.tobytes()
        total += n
        assert outputs["key_present"].shape == (1, 1, H, total)
        assert outputs["value_present"][0, 0, :, 0].tolist() == [-each for each in range(total)]
        past = {"key_past": outputs["key_present"], "value_past": outputs["value_present"]}
    assert running.fakes.attention.memory.faults == []


async def test_a_cache_of_fixed_size(running: Running) -> None:
    """As MindSpore's layer is called: all slots from the first call on, with the prompt's own lengths, and a mask over
    all of them."""
    slots, lengths = 8, [3, 5]
    first = valued(2, 1, slots, 0, batch_valid_length=np.array(lengths, np.int32)) | empty(2, slots)
    outputs = await call(running, first)
    for step in range(3):
        key, value = outputs["key_present"], outputs["value_present"]
        assert (key.shape, value.shape) == ((2, 1, H, slots), (2, 1, slots, H))
        for row, length in enumerate(lengths):
            assert key[row, 0, 0].tolist() == [1, 2, 3, 4, 5][: length - step] + [9] * step + [0] * (slots - length)
        lengths = [length + 1 for length in lengths]
        arrays = valued(2, 9, 1, slots - 1, batch_valid_length=np.array(lengths, np.int64))
        assert arrays["attention_mask"].shape == (2, 1, slots)
        outputs = await call(running, arrays | {"key_past": key, "value_past": value})
        assert outputs["attn_out"][:, 0, 0].tolist() == [length - 1 + 0.5 for length in lengths]


async def test_a_full_cache_grows(running: Running) -> None:
    outputs = await call(running, valued(1, 1, 1, 2) | empty(1, 2))
    assert outputs["key_present"].shape == (1, 1, H, 3)


async def test_presents_without_a_past(running: Running) -> None:
    outputs = [{"name": "value_present", "parameters": {"binary_data": False}}]
    given = await call(running, valued(1, 1, 2, 0), outputs=outputs)
    assert given["value_present"][0, 0].tolist() == [[-1] * H, [-2] * H]


async def test_queries_alone_ask_a_past(running: Running) -> None:
    """The slots that batch_valid_length counts; nothing is added."""
    past = empty(1, 4)
    arrays: dict[str, Array] = {
        "query": np.full((1, 2, H), 0.5, np.float16),
        "attention_mask": np.ones((1, 2, 3), np.uint8),
    }
    outputs = await call(running, arrays | past | {"batch_valid_length": np.array([3], np.int32)})
    assert outputs["attn_out"][0, :, 0].tolist() == [3.5, 4.5]
    assert outputs["key_present"].shape == (1, 1, H, 4)


@settings(max_examples=8)
@given(st.data())
def test_any_cut_of_an_append_gives_the_same_present(data: st.DataObject) -> None:
    """Rows of any lengths, brought in calls of any sizes."""
    cuts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rows = data.draw(st.integers(1, 3))

    async def run() -> None:
        async with served() as running:
            past, total = empty(rows, 0), 0
            for n in cuts:
                outputs = await call(running, valued(rows, 20 + total, n, total) | past)
                total += n
                past = {"key_past": outputs["key_present"], "value_past": outputs["value_present"]}
            whole = await call(running, valued(rows, 20, total, 0) | empty(rows, 0))
            for name in ("key_present", "value_present"):
                assert whole[name].tobytes() == outputs[name].tobytes()

    asyncio.run(run())


BAD: dict[str, tuple[dict[str, Array], int, str]] = {
    "one alone": ({"key_past": empty(1, 2)["key_past"]}, 422, "value_past: is required"),
    "three axes": ({**empty(1, 2), "key_past": np.zeros((1, H, 2), np.float16)}, 422, "key_past: must have four axes"),
    "another width": (
        {**empty(1, 2), "key_past": np.zeros((1, 1, H + 1, 2), np.float16)},
        422,
        "key_past: shape must be (1, 1, 4, 2)",
    ),
    "slots that disagree": ({**empty(1, 2), "value_past": empty(1, 3)["value_past"]}, 422, "value_past: shape"),
    "more rows": (empty(2, 2), 422, "batch_valid_length"),
    "another dtype": ({**empty(1, 2), "key_past": np.zeros((1, 1, H, 2), np.float32)}, 422, "key_past: dtype must be"),
    "NaN": ({**empty(1, 2), "key_past": np.full((1, 1, H, 2), np.nan, np.float16)}, 422, "key_past: has NaN"),
    "lengths beyond the slots": (
        {**empty(1, 2), "batch_valid_length": np.array([4], np.int32)},
        422,
        "batch_valid_length: each must be 0 to 2",
    ),
    "too many lengths": (
        {**empty(1, 2), "batch_valid_length": np.array([3, 3], np.int32)},
        422,
        "batch_valid_length: has 2 rows",
    ),
    "a past that is too long": (empty(1, 100), 422, "max_length"),
}


@pytest.mark.parametrize(("arrays", "status", "words"), BAD.values(), ids=BAD.keys())
async def test_pasts_that_are_wrong(running: Running, arrays: dict[str, Array], status: int, words: str) -> None:
    slots = arrays["key_past"].shape[-1]
    before = running.state()
    refused(await post(running, "echo", valued(1, 1, 1, slots) | arrays), status, words)
    assert running.state() == before


async def test_a_sequence_keeps_its_own_past(running: Running) -> None:
    arrays = valued(1, 1, 1, 2) | empty(1, 2)
    refused(await post(running, "echo", arrays, **sequence(5, start=True)), 422, "sequence_id")
    outputs = [{"name": "key_present"}]
    refused(await post(running, "echo", valued(1, 1, 1, 0), outputs=outputs, **sequence(5, start=True)), 422)
    refused(await post(running, "letters", {"token_ids": np.ones((1, 1), int)} | empty(1, 2)), 422, "key_past: model")
    assert running.fakes.engine.sessions() == []


async def test_a_call_that_fails_leaves_nothing(running: Running) -> None:
    before = running.state()
    poisoned = valued(1, POISON, 1, 2) | empty(1, 2)
    refused(await post(running, "echo", poisoned), 500)
    assert running.state() == before


async def test_a_call_that_has_to_make_room_is_to_be_sent_again(running: Running) -> None:
    """Its session went while it ran, as by an eviction."""
    runner, engine = running.fakes.attention, running.fakes.engine
    runner.gate.clear()
    request = asyncio.create_task(post(running, "echo", valued(1, 1, 1, 2) | empty(1, 2)))
    await until(runner.entered.is_set)
    engine.delete_session(engine.sessions()[0].id)
    runner.gate.set()
    reply = await request
    refused(reply, 429, "try again")
    assert reply.headers["retry-after"] == "1"
    assert engine.sessions() == []
