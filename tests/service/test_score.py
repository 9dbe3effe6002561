"""A dry run over HTTP: a prefill's answer, and a session that is as before."""

import asyncio
import json
from typing import Any

import pytest

from keypast.wire import SAFETENSORS_TYPE, load_tensors
from tests.service.conftest import Running
from tests.service.fakes import KINDS, Kind

pytestmark = pytest.mark.anyio

DECODER = KINDS["decoder"]


def asked(kind: Kind) -> dict[str, Any]:
    return {"logits": "all", "sample": {}, "top_logprobs": 2} if kind is DECODER else {"need_weights": True}


async def test_it_answers_as_a_prefill_and_keeps_nothing(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 5)}"
    before = running.state()
    body = kind.json(3, 5, **asked(kind))
    scored = await running.client.post(f"{path}/score", json=body, headers={"if-match": '"1"'})
    assert running.state() == before
    prefilled = await running.client.post(f"{path}/prefill", json=body)
    assert (scored.status_code, scored.json()["outputs"]) == (200, prefilled.json()["outputs"])
    lengths = [(reply.json()["past_length"], reply.json()["valid_length"]) for reply in (scored, prefilled)]
    assert lengths == [([5], [8])] * 2
    assert (scored.json()["version"], scored.headers["etag"]) == (1, '"1"')
    assert (scored.headers["keypast-past-length"], scored.headers["keypast-valid-length"]) == ("5", "8")


async def test_safetensors_and_an_empty_session(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.session(kind)}"
    before = running.state()
    options: dict[str, Any] = {"logits": "all"} if kind is DECODER else {}
    replies = [
        await running.client.post(f"{path}/{verb}", **kind.binary(3, **options)) for verb in ("score", "prefill")
    ]
    scored, prefilled = (load_tensors(reply.content) for reply in replies)
    assert replies[0].headers["content-type"] == SAFETENSORS_TYPE
    assert {name: array.tolist() for name, array in scored.arrays.items()} == {
        name: array.tolist() for name, array in prefilled.arrays.items()
    }
    assert (scored.metadata["version"], prefilled.metadata["version"]) == ("0", "1")
    assert before[0][0][1] == [0]


@pytest.mark.parametrize("binary", [False, True])
async def test_log_probabilities_of_the_tokens_given(running: Running, binary: bool) -> None:
    """The fake says 0 for the letter that comes next, and -1 for another."""
    path = f"/v1/sessions/{await running.session('letters', batch_size=2)}"
    accept = {"accept": SAFETENSORS_TYPE} if binary else {}

    async def told(verb: str, **body: Any) -> Any:
        body |= {"token_logprobs": True}
        reply = await running.client.post(f"{path}/{verb}", json=body, headers=accept)
        assert reply.status_code == 200, reply.text
        if not binary:
            return reply.json()["outputs"]["token_logprobs"]
        arrays, metadata = load_tensors(reply.content)
        assert arrays == {}
        return json.loads(metadata["token_logprobs"])

    assert await told("score", text=["abcx", "mn"]) == [[None, 0, 0, -1], [None, 0]]
    assert await told("prefill", text=["abcx", "mn"]) == [[None, 0, 0, -1], [None, 0]]
    assert await told("score", text=["yz", "mno"]) == [[0, 0], [-1, 0, 0]]
    assert await told("step", text=["y", "x"]) == [[0], [-1]]
    await running.client.post(f"{path}/truncate", json={"length": [4, 1]})
    body = {"token_ids": [[121, 0], [110, 111]], "batch_valid_length": [4, 3]}
    assert await told("score", **body) == [[], [0, 0]]


async def test_an_attention_layer_has_no_log_probabilities(running: Running) -> None:
    kind = KINDS["attention"]
    path = f"/v1/sessions/{await running.prefilled(kind, 5)}"
    reply = await running.client.post(f"{path}/score", json=kind.json(1, 5, token_logprobs=True))
    assert (reply.status_code, reply.json()["field"]) == (422, "token_logprobs")


async def test_a_refused_or_failed_score_changes_nothing(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 5)
    path = f"/v1/sessions/{session_id}"
    await running.client.post(f"{path}/fork", json={})
    before = running.state()
    told = []
    for body, headers in (
        (kind.json(3, 5, poison=True), {}),
        (kind.json(3, 5), {"if-match": '"7"'}),
        (kind.json(96, 5), {}),
        (kind.json(3, 5, batch_valid_length=[4]), {}),
    ):
        reply = await running.client.post(f"{path}/score", json=body, headers=headers)
        told.append((reply.status_code, reply.json()["code"]))
    assert told == [(500, "model_failed"), (412, "moved"), (422, "length_exceeded"), (422, "invalid_input")]
    assert running.state() == before


async def test_scores_of_many_sessions_share_a_batch_with_steps(running: Running, kind: Kind) -> None:
    sessions = [await running.prefilled(kind, 2) for _ in range(4)]
    runner = running.fakes.runner(kind)
    holding = await running.prefilled(kind, 2)
    runner.entered.clear()
    runner.gate.clear()
    first = asyncio.create_task(running.client.post(f"/v1/sessions/{holding}/step", json=kind.json(1, 2)))
    await asyncio.to_thread(runner.entered.wait)
    verbs = ["score", "step", "score", "step"]
    calls = [
        asyncio.create_task(running.client.post(f"/v1/sessions/{session}/{verb}", json=kind.json(1, 2)))
        for session, verb in zip(sessions, verbs, strict=True)
    ]
    while running.fakes.engine.capacity().waiting < 5:
        await asyncio.sleep(0.002)
    runner.gate.set()
    assert [(await call).status_code for call in [first, *calls]] == [200] * 5
    assert runner.batches[-1] == [(2, 3)] * 4
    lengths = [running.fakes.engine.session(session).valid_length for session in sessions]
    assert lengths == [[2], [3], [2], [3]]
