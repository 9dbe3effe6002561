"""The Open Inference Protocol over both kinds of model: what is told of them, and sequences."""

import asyncio
import json
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keypast.oip import EXTENSIONS
from keypast.wire import SAFETENSORS_TYPE, Array, dump_tensors, load_tensors
from tests.service.conftest import Running, Start, until
from tests.service.fakes import KINDS, H, Kind
from tests.service.inference import asked, post, refused, sequence, served, told
from tests.service.raw_client import RawRequest
from tests.service.tenants import KEYS, as_tenant

pytestmark = pytest.mark.anyio

DECODER, ATTENTION = KINDS["decoder"], KINDS["attention"]
OUTPUT = {"letters": "logits", "echo": "attn_out"}


async def sessions(running: Running, **headers: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await running.client.get("/v1/sessions", headers=headers)).json()["data"]
    return found


# ---- what is served --------------------------------------------------------------------------------------------------


async def test_what_the_service_is(running: Running) -> None:
    server = (await running.client.get("/v2")).json()
    assert (server["name"], server["extensions"]) == ("keypast", list(EXTENSIONS))
    ready = ("/v2/health/ready", "/v2/models/echo/ready", "/v2/models/echo/versions/1/ready")
    for path in ("/v2/health/live", *ready):
        reply = await running.client.get(path)
        assert (reply.status_code, reply.content) == (200, b"")
    await running.service.stop()
    for path in ready:
        reply = await running.client.get(path)
        assert (reply.status_code, reply.headers["retry-after"], reply.content) == (503, "1", b"")
    assert (await running.client.get("/v2/health/live")).status_code == 200


async def test_what_a_layer_takes_and_gives(running: Running) -> None:
    reply = await running.client.get("/v2/models/echo")
    assert reply.content == (await running.client.get("/v2/models/echo/versions/1")).content
    assert reply.json() == {
        "name": "echo",
        "versions": ["1"],
        "platform": "keypast",
        "inputs": [
            {"name": "query", "datatype": "FP16", "shape": [-1, -1, H]},
            {"name": "key", "datatype": "FP16", "shape": [-1, -1, H]},
            {"name": "value", "datatype": "FP16", "shape": [-1, -1, H]},
            {"name": "attention_mask", "datatype": "BOOL", "shape": [-1, -1, -1]},
            {"name": "batch_valid_length", "datatype": "INT32", "shape": [-1]},
            {"name": "key_past", "datatype": "FP16", "shape": [-1, 1, H, -1]},
            {"name": "value_past", "datatype": "FP16", "shape": [-1, 1, -1, H]},
        ],
        "outputs": [{"name": "attn_out", "datatype": "FP16", "shape": [-1, -1, H]}],
    }
    config = (await running.client.get("/v2/models/echo/config")).json()
    assert config["input"][0] == {"name": "query", "data_type": "TYPE_FP16", "dims": [-1, -1, H], "optional": False}
    assert config["input"][3]["optional"]
    assert config["sequence_batching"] == {"max_sequence_idle_microseconds": 600_000_000}
    further = config["parameters"]["further_outputs"]["string_value"]
    assert further == "attn_weights,valid_length,key_present,value_present"


async def test_what_a_decoder_takes_and_gives(running: Running) -> None:
    model = (await running.client.get("/v2/models/letters")).json()
    assert [(each["name"], each["datatype"]) for each in model["inputs"]] == [
        ("token_ids", "INT64"),
        ("text", "BYTES"),
        ("batch_valid_length", "INT32"),
    ]
    assert [(each["name"], each["shape"]) for each in model["outputs"]] == [
        ("logits", [-1, 259]),
        ("next_token", [-1]),
        ("text", [-1]),
    ]
    config = (await running.client.get("/v2/models/letters/config")).json()
    assert [(each["data_type"], each["optional"]) for each in config["input"][:2]] == [
        ("TYPE_INT64", True),
        ("TYPE_STRING", True),
    ]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/nobody/ready", 404),
        ("GET", "/v2/models/echo/versions/2", 404),
        ("GET", "/v2/models/echo/versions/2/config", 404),
        ("POST", "/v2/models/nobody/infer", 404),
        ("POST", "/v2/models/echo/versions/2/infer", 404),
        ("GET", "/v2/models/echo/stats", 404),
        ("POST", "/v2/repository/index", 404),
        ("GET", "/v2/systemsharedmemory/status", 404),
        ("DELETE", "/v2/models/echo", 405),
        ("POST", "/v2", 405),
    ],
)
async def test_what_is_not_there_is_told_in_the_protocols_words(
    running: Running, method: str, path: str, status: int
) -> None:
    refused(await running.client.request(method, path), status)


async def test_who_has_no_key_is_told_in_the_protocols_words(start: Start) -> None:
    running = await start(settings={"keys": KEYS})
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/echo"):
        assert (await running.client.get(path)).json()["error"].startswith("there is no valid API key")
        assert (await running.client.get(path, headers=as_tenant("a"))).status_code == 200
    refused(await running.client.post("/v2/models/echo/infer"), 401)


# ---- sequences -------------------------------------------------------------------------------------------------------


async def native(running: Running, kind: Kind, session: str, verb: str, arrays: dict[str, Array]) -> dict[str, Array]:
    headers = {"content-type": SAFETENSORS_TYPE, "accept": SAFETENSORS_TYPE}
    params = {"logits": "last"} if kind is DECODER else {}
    reply = await running.client.post(
        f"/v1/sessions/{session}/{verb}", content=dump_tensors(arrays, {}), headers=headers, params=params
    )
    assert reply.status_code == 200, reply.text
    return load_tensors(reply.content).arrays


@pytest.mark.parametrize("name", [7, 2**64 - 1, "7", "a/../b \u00e9"])
@pytest.mark.parametrize("binary", [True, False])
async def test_a_sequence_is_a_session(running: Running, kind: Kind, name: int | str, binary: bool) -> None:
    """Prefill, two steps, the last of which ends it: the native API's numbers, to the bit."""
    twin = await running.session(kind)
    for at, n in enumerate((3, 1, 1)):
        past = (0, 3, 4)[at]
        arrays = kind.inputs(n, past, 1, False)
        asks = sequence(name, start=at == 0, end=at == 2, binary_data_output=binary)
        answer = told(await post(running, kind.model, arrays, binary=binary, id=f"r{at}", **asks))
        expected = await native(running, kind, twin, "step" if at else "prefill", arrays)
        output = answer.outputs[OUTPUT[kind.model]]
        assert output.tobytes() == expected[OUTPUT[kind.model]].tobytes()
        assert (answer.head["id"], answer.head["model_name"], answer.head["model_version"]) == (
            f"r{at}",
            kind.model,
            "1",
        )
        assert answer.head["parameters"] == {"sequence_id": name, "version": at + 1}
        assert answer.reply.headers["keypast-valid-length"] == str(past + n)
        if at < 2:
            own = next(session for session in await sessions(running) if session["id"] != twin)
            assert (own["valid_length"], own["labels"]) == ([past + n], {"sequence_id": str(name)})
            assert own["ttl_seconds"] == 600
    assert [session["id"] for session in await sessions(running)] == [twin]


async def test_a_number_and_a_text_are_two_sequences(running: Running, kind: Kind) -> None:
    first = kind.inputs(2, 0, 1, False)
    for name in (5, "5"):
        told(await post(running, kind.model, first, **sequence(name, start=True)))
    told(await post(running, kind.model, kind.inputs(1, 2, 1, False), **sequence("5")))
    assert sorted(session["valid_length"][0] for session in await sessions(running)) == [2, 3]


async def test_each_model_has_its_own_sequences(running: Running) -> None:
    for kind, n in ((DECODER, 2), (ATTENTION, 3)):
        told(await post(running, kind.model, kind.inputs(n, 0, 1, False), **sequence(5, start=True)))
    lengths = {session["model"]: session["valid_length"] for session in await sessions(running)}
    assert lengths == {"letters": [2], "echo": [3]}


async def test_without_a_start_there_is_no_sequence(running: Running, kind: Kind) -> None:
    arrays = kind.inputs(1, 2, 1, False)
    before = running.state()
    refused(await post(running, kind.model, arrays, **sequence(5)), 400, "sequence_id", "sequence_start")
    refused(await post(running, kind.model, arrays, **sequence(5, end=True)), 400)
    assert running.state() == before
    told(await post(running, kind.model, kind.inputs(2, 0, 1, False), **sequence(5, start=True, end=True)))
    refused(await post(running, kind.model, arrays, **sequence(5)), 400, "deleted")


async def test_a_start_begins_anew(running: Running, kind: Kind) -> None:
    told(await post(running, kind.model, kind.inputs(3, 0, 1, False), **sequence(5, start=True)))
    again = told(await post(running, kind.model, kind.inputs(2, 0, 1, False), **sequence(5, start=True)))
    assert again.reply.headers["keypast-past-length"] == "0"
    assert [session["valid_length"] for session in await sessions(running)] == [[2]]


async def test_a_sequence_is_its_tenants(start: Start, kind: Kind) -> None:
    running = await start(settings={"keys": KEYS})
    first, step = kind.inputs(2, 0, 1, False), kind.inputs(1, 2, 1, False)
    told(await post(running, kind.model, first, headers=as_tenant("a"), **sequence(5, start=True)))
    theirs = await post(running, kind.model, step, headers=as_tenant("b"), **sequence(5))
    never = await post(running, kind.model, step, headers=as_tenant("b"), **sequence(6))
    refused(theirs, 400)
    assert theirs.content == never.content
    told(await post(running, kind.model, first, headers=as_tenant("b"), **sequence(5, start=True, end=True)))
    told(await post(running, kind.model, step, headers=as_tenant("a"), **sequence(5)))
    assert await sessions(running, **as_tenant("b")) == []


async def test_what_fails_is_as_before(running: Running, kind: Kind) -> None:
    """A start leaves nothing, a step or an end leaves the sequence."""
    refused(await post(running, kind.model, kind.inputs(2, 0, 1, True), **sequence(5, start=True)), 500, "model failed")
    assert await sessions(running) == []
    told(await post(running, kind.model, kind.inputs(2, 0, 1, False), **sequence(5, start=True)))
    for end in (False, True):
        before = running.state()
        refused(await post(running, kind.model, kind.inputs(1, 2, 1, True), **sequence(5, end=end)), 500)
        wide = {name: np.repeat(array, 2, 0) for name, array in kind.inputs(1, 2, 1, False).items()}
        refused(await post(running, kind.model, wide, **sequence(5, end=end)), 422, "shape must be")
        assert running.state() == before
    told(await post(running, kind.model, kind.inputs(1, 2, 1, False), **sequence(5, end=True)))


async def test_a_step_needs_no_mask(running: Running) -> None:
    arrays = ATTENTION.inputs(2, 0, 1, False)
    step = {name: array[:, :1] for name, array in arrays.items() if name != "attention_mask"}
    refused(await post(running, "echo", step, **sequence(5, start=True)), 422, "attention_mask", "required")
    told(await post(running, "echo", arrays, **sequence(5, start=True)))
    told(await post(running, "echo", step, **sequence(5)))
    refused(await post(running, "echo", step, **sequence(5), headers={"if-match": '"0"'}), 412, "version 2")
    lengths = {"batch_valid_length": np.array([3], np.int32)}
    refused(await post(running, "echo", step | lengths, **sequence(5)), 412, "expected [4]")


async def test_a_step_with_a_key_is_done_once(running: Running, kind: Kind) -> None:
    told(await post(running, kind.model, kind.inputs(2, 0, 1, False), **sequence(5, start=True)))
    step = kind.inputs(1, 2, 1, False)
    first, again = [
        told(await post(running, kind.model, step, headers={"idempotency-key": "k"}, **sequence(5))) for _ in range(2)
    ]
    assert (again.reply.content, again.reply.headers["idempotent-replayed"]) == (first.reply.content, "true")
    assert [session["valid_length"] for session in await sessions(running)] == [[3]]


async def test_a_reader_who_leaves_before_the_start_leaves_nothing(running: Running, kind: Kind) -> None:
    runner = running.fakes.runner(kind)
    held = await running.session(kind)
    runner.gate.clear()
    first = asyncio.create_task(running.client.post(f"/v1/sessions/{held}/prefill", json=kind.json(1)))
    await until(runner.entered.is_set)
    content, _ = asked(kind.inputs(2, 0, 1, False), binary=False, **sequence(5, start=True))
    request = RawRequest(running.app, f"/v2/models/{kind.model}/infer", json.loads(content))
    await until(lambda: running.fakes.engine.capacity().waiting == 2)
    request.leave()
    await request.task
    runner.gate.set()
    assert (await first).status_code == 200
    await until(lambda: running.fakes.engine.idle)
    assert [session["id"] for session in await sessions(running)] == [held]


async def test_of_two_starts_with_an_id_the_later_is_the_sequence(running: Running, kind: Kind) -> None:
    """The earlier ends while it runs, and takes nothing along."""
    runner, first = running.fakes.runner(kind), kind.inputs(2, 0, 1, False)
    runner.gate.clear()
    earlier = asyncio.create_task(post(running, kind.model, first, **sequence(5, start=True, end=True)))
    await until(runner.entered.is_set)
    later = asyncio.create_task(post(running, kind.model, kind.inputs(3, 0, 1, False), **sequence(5, start=True)))
    refused(await earlier, 410, "deleted")
    runner.gate.set()
    told(await later)
    assert [session["valid_length"] for session in await sessions(running)] == [[3]]


async def test_a_sequence_that_nobody_uses_ends(start: Start, kind: Kind) -> None:
    running = await start(settings={"sequence_seconds": 0.05})
    told(await post(running, kind.model, kind.inputs(2, 0, 1, False), **sequence(5, start=True)))
    await until(lambda: running.fakes.engine.sessions() == [])
    refused(await post(running, kind.model, kind.inputs(1, 2, 1, False), **sequence(5)), 400, "expired")


class Asks(NamedTuple):
    given: int | str
    start: bool
    end: bool
    n: int
    poison: bool


ASKS = st.builds(Asks, st.sampled_from([1, 2, "1"]), st.booleans(), st.booleans(), st.integers(1, 3), st.booleans())


@settings(max_examples=10)
@given(st.sampled_from(sorted(KINDS)), st.lists(ASKS, min_size=1, max_size=12))
def test_sequences_are_what_a_dict_of_lengths_says(name: str, asks: list[Asks]) -> None:
    kind = KINDS[name]

    async def run() -> None:
        lengths: dict[int | str, int] = {}
        async with served() as running:
            for ask in asks:
                past = 0 if ask.start else lengths.get(ask.given, 0)
                arrays = kind.inputs(ask.n, past, 1, ask.poison)
                reply = await post(running, kind.model, arrays, **sequence(ask.given, start=ask.start, end=ask.end))
                if ask.start:
                    lengths.pop(ask.given, None)
                known = ask.start or ask.given in lengths
                assert reply.status_code == (400 if not known else 500 if ask.poison else 200)
                if known and not ask.poison:
                    lengths[ask.given] = past + ask.n
                    assert reply.headers["keypast-valid-length"] == str(past + ask.n)
                    if ask.end:
                        del lengths[ask.given]
                there = [session["valid_length"][0] for session in await sessions(running)]
                assert sorted(there) == sorted(lengths.values())

    asyncio.run(run())


PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "an id of -1": ({"sequence_id": -1}, "sequence_id"),
    "an id of 2^64": ({"sequence_id": 2**64}, "sequence_id"),
    "an id of 1.5": ({"sequence_id": 1.5}, "sequence_id"),
    "an id that is true": ({"sequence_id": True}, "sequence_id"),
    "an id of 129 characters": ({"sequence_id": "a" * 129}, "sequence_id"),
    "a start without an id": ({"sequence_start": True}, "sequence_id"),
    "an end of nothing": ({"sequence_id": "", "sequence_end": True}, "sequence_id"),
    "a start of 1": ({"sequence_id": 5, "sequence_start": 1}, "sequence_start"),
    "an unknown one": ({"need_weight": True}, "need_weight"),
    "bytes that are 1": ({"binary_data_output": 1}, "binary_data_output"),
    "a list": ({"sequence_id": [1]}, "parameters"),
    "too many": ({f"triton_{at}": 1 for at in range(65)}, "parameters"),
}


@pytest.mark.parametrize(("parameters", "field"), PARAMETERS.values(), ids=PARAMETERS.keys())
async def test_parameters_that_are_wrong(running: Running, kind: Kind, parameters: Any, field: str) -> None:
    before = running.state()
    error = refused(await post(running, kind.model, kind.inputs(2, 0, 1, False), parameters=parameters), 422)
    assert error.startswith(field)
    assert running.state() == before


async def test_parameters_that_are_tritons_are_let_be(running: Running, kind: Kind) -> None:
    parameters = {"priority": 1, "timeout": 1000, "triton_x": "y", "sequence_id": 0, "sequence_start": False}
    told(await post(running, kind.model, kind.inputs(2, 0, 1, False), parameters=parameters))
    assert await sessions(running) == []
