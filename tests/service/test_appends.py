"""Prefill and step, for both kinds, in every form."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from keypast.wire import JSON_TYPE, SAFETENSORS_TYPE, dump_tensors, encode_tensor, load_tensors, read_reply
from service.routes.inference import LARGE
from tests.service.conftest import Running, Start
from tests.service.fakes import KINDS, VOCABULARY, H, Kind, event_data

pytestmark = pytest.mark.anyio

DECODER, ATTENTION = KINDS["decoder"], KINDS["attention"]


def row(token: int) -> list[float]:
    return [float(i == token) for i in range(VOCABULARY)]


async def test_lengths_version_and_timings(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.session(kind)}"
    first = await running.client.post(f"{path}/prefill", json=kind.json(5))
    second = await running.client.post(f"{path}/prefill", json=kind.json(3, 5))
    third = await running.client.post(f"{path}/step", json=kind.json(1, 8, batch_valid_length=[9]))
    told = [
        (r.status_code, r.json()["past_length"], r.json()["valid_length"], r.json()["version"])
        for r in (first, second, third)
    ]
    assert told == [(200, [0], [5], 1), (200, [5], [8], 2), (200, [8], [9], 3)]
    assert all(r.json()["timings"]["compute_ms"] > 0 for r in (first, second, third))
    assert (third.headers["etag"], third.headers["keypast-valid-length"]) == ('"3"', "9")
    session = (await running.client.get(path)).json()
    assert (session["valid_length"], session["version"], session["state"]) == ([9], 3, "idle")


async def test_every_reply_says_what_was_computed_and_what_reused(running: Running, kind: Kind) -> None:
    parent = f"/v1/sessions/{await running.prefilled(kind, 6)}"
    child = (await running.client.post(f"{parent}/fork", json={})).json()["sessions"][0]["id"]
    path = f"/v1/sessions/{child}"
    for verb, n, past, shared in (("score", 3, 6, 6), ("prefill", 3, 6, 6), ("step", 1, 9, 4)):
        reply = await running.client.post(f"{path}/{verb}", json=kind.json(n, past))
        told = reply.json()
        assert (told["computed"], told["reused"], told["shared"]) == ([n], [past], [shared]), verb
        headers = [reply.headers[f"keypast-{name}"] for name in ("computed", "reused", "shared")]
        assert headers == [str(n), str(past), str(shared)]


async def test_a_generation_says_so_too(running: Running) -> None:
    path = f"/v1/sessions/{await running.prefilled(DECODER, 6)}"
    await running.client.post(f"{path}/truncate", json={"length": 5})
    whole = (await running.client.post(f"{path}/generate", json={"max_tokens": 2})).json()
    assert (whole["computed"], whole["reused"], whole["shared"]) == ([3], [4], [0]), "the last position once more"
    stream = await running.client.post(f"{path}/generate", json={"max_tokens": 2, "stream": True})
    end = event_data(stream.text)[-2]
    assert (end["computed"], end["reused"], end["valid_length"]) == ([2], [7], [9])


async def test_attention_gives_the_form_it_was_given(running: Running) -> None:
    arrays = ATTENTION.inputs(2, 0, 1, False)
    expected = [[[0.5] * H, [1.5] * H]]
    for form in ("nested", "flat", "base64"):
        path = f"/v1/sessions/{await running.session('echo')}/prefill"
        body = {name: encode_tensor(array, form) for name, array in arrays.items()}
        reply = await running.client.post(path, json=body)
        assert set(reply.json()["outputs"]["attn_out"]) == set(body["query"])
        _, outputs = read_reply(reply.headers["content-type"], reply.content)
        assert outputs["attn_out"].tolist() == expected


async def test_safetensors_in_and_out(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.session(kind)}"
    options = {"logits": "last"} if kind is DECODER else {"need_weights": True}
    reply = await running.client.post(f"{path}/prefill", **kind.binary(3, 0, **options))
    assert reply.headers["content-type"] == SAFETENSORS_TYPE
    arrays, metadata = load_tensors(reply.content)
    assert (metadata["valid_length"], metadata["version"]) == ("[3]", "1")
    if kind is DECODER:
        assert arrays["logits"].tolist() == [[row(98)]]
    else:
        assert arrays["attn_out"][0, :, 0].tolist() == [0.5, 1.5, 2.5]
        assert arrays["attn_weights"].shape == (1, 3, 3)
    step = kind.binary(1, 3)
    step["headers"]["accept"] = JSON_TYPE
    reply = await running.client.post(f"{path}/step", **step)
    assert (reply.headers["content-type"], reply.json()["valid_length"]) == (JSON_TYPE, [4])


async def test_accept_asks_for_safetensors(running: Running) -> None:
    path = f"/v1/sessions/{await running.session('letters')}/prefill"
    headers = {"accept": SAFETENSORS_TYPE}
    reply = await running.client.post(path, json=DECODER.json(2, logits="all"), headers=headers)
    assert load_tensors(reply.content).arrays["logits"].tolist() == [[row(98), row(98)]]


async def test_ragged_rows(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.session(kind, batch_size=2)}"
    reply = await running.client.post(f"{path}/prefill", json=kind.json(4, rows=2, batch_valid_length=[4, 2]))
    assert (reply.status_code, reply.json()["valid_length"]) == (200, [4, 2])
    reply = await running.client.post(f"{path}/step", json=kind.json(1, 4, rows=2, batch_valid_length=[5, 3]))
    assert (reply.status_code, reply.json()["valid_length"]) == (200, [5, 3])
    reply = await running.client.post(f"{path}/step", json=kind.json(1, 5, rows=2, batch_valid_length=[6, 3]))
    assert (reply.status_code, reply.json()["code"], reply.json()["valid_length"]) == (412, "moved", [5, 3])


def memory(m: int, rows: int = 1) -> dict[str, Any]:
    """Keys and values alone."""
    tensors = ATTENTION.json(m, rows=rows)
    return {name: tensors[name] for name in ("key", "value")}


def asking(n: int, length: int, rows: int = 1) -> dict[str, Any]:
    """Queries alone."""
    mask = {"attention_mask": encode_tensor(np.ones((rows, n, length), np.uint8), "nested")}
    return {"query": ATTENTION.json(n, rows=rows)["query"], **mask}


async def test_keys_that_stay_are_asked_by_queries_alone(running: Running) -> None:
    path = f"/v1/sessions/{await running.session('echo', batch_size=2)}"
    reply = await running.client.post(f"{path}/prefill", json={**memory(5, 2), "batch_valid_length": [5, 3]})
    assert (reply.status_code, reply.json()["outputs"]) == (200, {})
    before = (await running.client.get(path)).json()
    told = [reply.json()]
    for verb, body in (
        ("prefill", asking(4, 5, 2)),
        ("step", {"query": asking(1, 5, 2)["query"]}),
        ("step", {**asking(1, 5, 2), "batch_valid_length": [5, 3]}),
    ):
        reply = await running.client.post(f"{path}/{verb}", json=body, headers={"if-match": '"1"'})
        assert (reply.status_code, reply.headers["etag"]) == (200, '"1"'), reply.text
        told.append(reply.json())
    assert [(one["past_length"], one["valid_length"], one["version"]) for one in told] == [
        ([0, 0], [5, 3], 1),
        *[([5, 3], [5, 3], 1)] * 3,
    ]
    assert [one["outputs"]["attn_out"]["shape"] for one in told[1:]] == [[2, 4, H], [2, 1, H], [2, 1, H]]
    after = (await running.client.get(path)).json()
    assert {**before, "last_used_at": None} == {**after, "last_used_at": None}
    reply = await running.client.post(f"{path}/step", json=ATTENTION.json(1, 5, rows=2))
    assert (reply.json()["valid_length"], reply.json()["version"]) == ([6, 4], 2), "it may still grow"


async def test_more_queries_than_keys_and_fewer(running: Running) -> None:
    path = f"/v1/sessions/{await running.session('echo')}/prefill"
    for n, m, length in ((2, 5, 5), (7, 1, 6)):
        reply = await running.client.post(path, json={**memory(m), **asking(n, length)})
        assert (reply.status_code, reply.json()["valid_length"]) == (200, [length])
        assert reply.json()["outputs"]["attn_out"]["shape"] == [1, n, H]


async def test_cross_attention_in_safetensors(running: Running) -> None:
    """A reply without an output is a file without a tensor."""
    path = f"/v1/sessions/{await running.session('echo')}"
    tensors = ATTENTION.inputs(5, 0, 1, False)
    headers = {"content-type": SAFETENSORS_TYPE}
    body = dump_tensors({name: tensors[name] for name in ("key", "value")}, {})
    reply = await running.client.post(f"{path}/prefill", content=body, headers=headers)
    assert (reply.status_code, reply.headers["content-type"]) == (200, SAFETENSORS_TYPE)
    arrays, metadata = load_tensors(reply.content)
    assert (arrays, metadata["valid_length"]) == ({}, "[5]")
    body = dump_tensors({"query": tensors["query"][:, :1]}, {})
    reply = await running.client.post(f"{path}/step", content=body, headers=headers, params={"need_weights": "true"})
    arrays, metadata = load_tensors(reply.content)
    assert (arrays["attn_out"].shape, arrays["attn_weights"].shape, metadata["version"]) == ((1, 1, H), (1, 1, 5), "1")


async def test_next_token_is_told_and_not_appended(running: Running) -> None:
    path = f"/v1/sessions/{await running.session('letters')}"
    body = {"text": "ab", "sample": {"temperature": 0}, "top_logprobs": 2}
    reply = (await running.client.post(f"{path}/prefill", json=body)).json()
    assert reply["outputs"] == {
        "next_token": [ord("c")],
        "text": ["c"],
        "top_logprobs": [
            [
                {"token_id": ord("c"), "logprob": 0.0, "text": "c"},
                {"token_id": ord("d"), "logprob": -1.0, "text": "d"},
            ]
        ],
    }
    assert reply["valid_length"] == [2]
    step = (await running.client.post(f"{path}/step", json={"token_ids": [[ord("c")]], "logits": "last"})).json()
    assert step["outputs"]["logits"]["data"] == [[row(ord("d"))]]


async def test_a_row_that_appends_nothing_has_no_next_token(running: Running) -> None:
    path = f"/v1/sessions/{await running.session('letters', batch_size=2)}/prefill"
    body = {"token_ids": [[97, 98], [0, 0]], "batch_valid_length": [2, 0], "sample": {}, "top_logprobs": 1}
    outputs = (await running.client.post(path, json=body)).json()["outputs"]
    assert (outputs["next_token"], outputs["text"], outputs["top_logprobs"][1]) == ([99, None], ["c", ""], [])


async def test_text_a_row_is_padded_and_counted(running: Running) -> None:
    path = f"/v1/sessions/{await running.session('letters', batch_size=3)}"
    body: dict[str, Any] = {"text": ["abc", "x", "mn"], "sample": {}}
    reply = (await running.client.post(f"{path}/prefill", json=body)).json()
    assert (reply["valid_length"], reply["outputs"]["text"]) == ([3, 1, 2], ["d", "y", "o"])
    body = {"text": ["d", "yz", "o"], "batch_valid_length": [4, 3, 3]}
    assert (await running.client.post(f"{path}/prefill", json=body)).json()["valid_length"] == [4, 3, 3]
    wrong = await running.client.post(f"{path}/prefill", json=body)
    assert (wrong.status_code, wrong.json()["field"]) == (422, "batch_valid_length")
    equal = await running.client.post(f"{path}/step", json={"text": ["d", "y", "o"]})
    assert equal.json()["valid_length"] == [5, 4, 4]


async def test_ragged_text_never_lands_after_another_append(running: Running) -> None:
    """Its lengths are counted from the past it saw."""
    path = f"/v1/sessions/{await running.session('letters', batch_size=2)}/prefill"
    gate = running.fakes.decoder.gate
    gate.clear()
    first = asyncio.create_task(running.client.post(path, json=DECODER.json(2, rows=2)))
    await asyncio.to_thread(running.fakes.decoder.entered.wait)
    second = asyncio.create_task(running.client.post(path, json={"text": ["abc", "x"]}))
    await asyncio.sleep(0.02)
    gate.set()
    assert ((await first).status_code, (await second).status_code) == (200, 412)


async def test_messages_go_through_the_models_template(running: Running) -> None:
    path = f"/v1/sessions/{await running.session('letters')}/prefill"

    def text() -> str:
        return "".join({257: "<|in|>", 258: "<|out|>"}.get(i) or chr(i) for i in running.fakes.decoder.fed[-1])

    reply = await running.client.post(path, json={"messages": [{"role": "user", "content": "hi <|out|>"}]})
    assert text() == "<|in|>user: hi <|out|><|out|><|in|>"
    assert reply.json()["valid_length"] == [3 + len("user: hi <|out|>")], "a forged control token is plain characters"
    await running.client.post(path, json={"messages": [{"role": "user", "content": "more"}]})
    assert text() == "<|out|><|in|>user: more<|out|><|in|>"


async def test_an_unseeded_draw_has_a_seed_of_its_own(running: Running) -> None:
    for options in ({}, {}, {"seed": 7}):
        path = f"/v1/sessions/{await running.session('letters')}/prefill"
        await running.client.post(path, json={"text": "a", "sample": {"temperature": 1.0, **options}})
    first, second, given = running.fakes.decoder.seeds
    assert first != second
    assert given == 7


async def test_large_bodies_and_replies(start: Start) -> None:
    """They are coded on another thread, with the same result."""
    running = await start(blocks=128)
    path = f"/v1/sessions/{await running.session('letters', batch_size=4)}/prefill"
    body = json.dumps(DECODER.json(90, rows=4, logits="all")).encode() + b" " * LARGE
    reply = await running.client.post(path, content=body)
    assert len(reply.content) > LARGE
    assert reply.json()["outputs"]["logits"]["shape"] == [4, 90, VOCABULARY]
