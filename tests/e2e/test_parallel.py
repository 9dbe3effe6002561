"""The service over two ranks, as processes, over a real socket: it gives what one gives, ends with every process, and
goes down when one dies."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_server import Server, until
from tests.processes import children, runs
from tests.tiny import save_tiny_decoder


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    models = {
        "tiny": str(save_tiny_decoder(tmp_path_factory.mktemp("tiny"))),
        "layer": "attention:hidden=16,heads=4",
    }
    return {"models": json.dumps(models), "dtype": "float32", "kv_dtype": "float32", "kv_memory": "16MiB"}


@pytest.fixture(scope="module")
def clients(settings: dict[str, str]) -> Iterator[list[httpx.Client]]:
    """Of the service over two ranks, and of the one over one."""
    with ExitStack() as stack:
        servers = [stack.enter_context(Server("service", **settings, model_parallel=str(n))) for n in (2, 1)]
        yield [stack.enter_context(httpx.Client(base_url=server.address(), timeout=30)) for server in servers]


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    reply = client.post(path, json=body)
    assert reply.is_success, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def tensor(n: int, past: int) -> dict[str, object]:
    values = [[[((past + i) * 16 + j) % 11 / 11 for j in range(16)] for i in range(n)]]
    return {"dtype": "float32", "shape": [1, n, 16], "data": values}


def layer_inputs(n: int, past: int) -> dict[str, Any]:
    mask = [[[int(t <= past + i) for t in range(past + n)] for i in range(n)]]
    mask_tensor = {"dtype": "bool", "shape": [1, n, past + n], "data": mask}
    return {**dict.fromkeys(("query", "key", "value"), tensor(n, past)), "attention_mask": mask_tensor}


def ranks(server: Server) -> list[int]:
    return children(server.process.pid, "spawn_main")


def use_decoder(client: httpx.Client) -> list[Any]:
    session = post(client, "/v1/sessions", model="tiny")["id"]
    path = f"/v1/sessions/{session}"
    want = {"logits": "last"}
    replies = [post(client, f"{path}/prefill", text="The capital of France is Paris. Name three rivers.", **want)]
    length = replies[0]["valid_length"][0]
    replies.append(post(client, f"{path}/step", token_ids=[[5]], **want))
    (child,) = post(client, f"{path}/fork", at=length - 3)["sessions"]
    replies.append(post(client, f"/v1/sessions/{child['id']}/generate", max_tokens=12))
    post(client, f"{path}/truncate", length=4)
    replies.append(post(client, f"{path}/generate", max_tokens=12))
    return [[reply["valid_length"], reply["outputs"]] for reply in replies]


def use_layer(client: httpx.Client) -> list[Any]:
    path = f"/v1/sessions/{post(client, '/v1/sessions', model='layer')['id']}"
    weights = {"need_weights": True, "average_attn_weights": False}
    replies = [post(client, f"{path}/prefill", **layer_inputs(20, 0), **weights)]
    replies.append(post(client, f"{path}/step", **layer_inputs(1, 20)))
    (child,) = post(client, f"{path}/fork", at=17)["sessions"]
    replies.append(post(client, f"/v1/sessions/{child['id']}/step", **layer_inputs(1, 17)))
    post(client, f"{path}/truncate", length=3)
    replies.append(post(client, f"{path}/prefill", **layer_inputs(4, 3), **weights))
    return [[reply["valid_length"], reply["outputs"]] for reply in replies]


def assert_alike(cut: Any, whole: Any, at: str = "") -> None:
    """Numbers within what the order of float32 sums explains, everything else equal."""
    if isinstance(whole, dict):
        assert cut.keys() == whole.keys()
        for key in whole:
            assert_alike(cut[key], whole[key], f"{at}.{key}")
    elif isinstance(whole, list):
        assert len(cut) == len(whole), at
        for index, (left, right) in enumerate(zip(cut, whole, strict=True)):
            assert_alike(left, right, f"{at}[{index}]")
    elif isinstance(whole, float):
        assert cut == pytest.approx(whole, abs=1e-4), at
    else:
        assert cut == whole, at


@pytest.mark.slow
@pytest.mark.parametrize("use", [use_decoder, use_layer])
def test_two_ranks_serve_what_one_serves(clients: list[httpx.Client], use: Any) -> None:
    cut, whole = map(use, clients)
    assert_alike(cut, whole)


@pytest.mark.slow
def test_both_have_room_for_as_much_and_say_the_same_of_their_models(clients: list[httpx.Client]) -> None:
    cut, whole = (client.get("/v1/models").json()["data"] for client in clients)
    for card in cut + whole:
        del card["created"]
    assert cut == whole


@pytest.mark.slow
def test_sigterm_ends_every_process(settings: dict[str, str]) -> None:
    with Server("service", **settings, model_parallel="2") as server:
        address = server.address()
        processes = children(server.process.pid)
        for rank in processes:
            os.kill(
                rank, signal.SIGTERM
            )  # as a container's end gives it to all: the ranks stay until the drain is over
        assert httpx.get(f"{address}/readyz").status_code == 200
        with httpx.Client(base_url=address, timeout=30) as client:
            use_layer(client)
        server.process.send_signal(signal.SIGTERM)
        code, printed = server.ends()
    assert (code, "Traceback" in printed) == (0, False)
    until(lambda: not any(map(runs, processes)))


@pytest.mark.slow
def test_no_process_outlives_a_service_that_is_killed(settings: dict[str, str], tmp_path: Path) -> None:
    with Server("service", **settings, model_parallel="2") as server:
        server.address()
        assert len(ranks(server)) == 1
        processes = children(server.process.pid)
        server.process.kill()
        until(lambda: not any(map(runs, processes)))


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_service_down(settings: dict[str, str]) -> None:
    """What runs is told, nothing hangs, and the process still ends as it is told to."""
    with Server("service", **settings, model_parallel="2") as server:
        address = server.address()
        with httpx.Client(base_url=address, timeout=30) as client, ThreadPoolExecutor() as threads:
            session = post(client, "/v1/sessions", model="tiny")["id"]
            path = f"/v1/sessions/{session}"
            post(client, f"{path}/prefill", token_ids=[[1, 2, 3]])
            running = threads.submit(httpx.post, f"{address}{path}/generate", json={"max_tokens": 500}, timeout=30)
            until(lambda: client.get(path).json()["state"] == "running")
            (rank,) = ranks(server)
            os.kill(rank, signal.SIGKILL)
            reply = running.result(30).json()  # the tokens that are in the session, or that there are none
            assert reply.get("finish_reason") == ["cancelled"] or reply["code"] == "engine_stopped"
            until(lambda: client.get("/readyz").json()["status"] == "down")
            refused = client.post(f"{path}/step", json={"token_ids": [[4]]})
            assert (refused.status_code, refused.json()["code"]) == (503, "engine_stopped")
            assert client.get("/readyz").json()["detail"] == "the engine has ended; the log says why"
        server.process.send_signal(signal.SIGTERM)
        code, printed = server.ends(20)
    assert code == 0
    assert "rank-1 has ended (exit code -9)" in printed


@pytest.mark.slow
def test_heads_that_the_ranks_cannot_share_are_one_clear_line(settings: dict[str, str]) -> None:
    with Server("service", **settings, model_parallel="3") as server:
        code, printed = server.ends()
    assert code == 1
    assert printed.splitlines()[-1] == (
        "keypast: model_parallel: model tiny has heads 4, kv_heads 2, intermediate_size 64; "
        "3 does not divide heads and kv_heads and intermediate_size, but each of 1, 2 would"
    )
    assert "Traceback" not in printed


@pytest.mark.slow
def test_the_default_model_answers_over_three_ranks() -> None:
    """Nine heads of the query, three of the past: three ranks, one each."""
    with Server("service", models="smollm=default", dtype="float32", model_parallel="3") as server:
        address = server.line(r"keypast serves .* on (http://\S+)", 300)[1]
        with httpx.Client(base_url=address, timeout=120) as client:
            path = f"/v1/sessions/{post(client, '/v1/sessions', model='smollm')['id']}"
            post(client, f"{path}/prefill", messages=[{"role": "user", "content": "What is the capital of France?"}])
            reply = post(client, f"{path}/generate", max_tokens=12)
    assert reply["outputs"]["text"] == ["The capital of France is Paris."]
