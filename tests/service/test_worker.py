"""What happens between the event loop and the engine's thread: order, batches, readers who leave, the end."""

import asyncio
import logging

import pytest

from tests.service.conftest import Running, Start, until
from tests.service.fakes import KINDS, Kind
from tests.service.raw_client import RawRequest

pytestmark = pytest.mark.anyio

DECODER = KINDS["decoder"]


async def waiting(running: Running, count: int) -> None:
    await until(lambda: running.fakes.engine.capacity().waiting >= count)


async def test_appends_to_one_session_run_in_order_of_arrival(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 1)}/prefill"
    runner = running.fakes.runner(kind)
    runner.gate.clear()
    tasks = []
    for i in range(8):
        body = kind.json(i + 1, 1 + i * (i + 1) // 2)  # what arrives i-th has i + 1 positions
        tasks.append(asyncio.create_task(running.client.post(path, json=body)))
        await waiting(running, i + 1)
    runner.gate.set()
    replies = [await task for task in tasks]
    assert [reply.status_code for reply in replies] == [200] * 8
    lengths = [reply.json()["valid_length"][0] for reply in replies]
    assert lengths == [1 + (i + 1) * (i + 2) // 2 for i in range(8)]
    assert [reply.json()["version"] for reply in replies] == list(range(2, 10))


async def test_too_many_waiting_is_429(start: Start, kind: Kind) -> None:
    running = await start(max_waiting_per_session=2)
    path = f"/v1/sessions/{await running.prefilled(kind, 1)}/step"
    running.fakes.runner(kind).gate.clear()
    tasks = [asyncio.create_task(running.client.post(path, json=kind.json(1, past))) for past in (1, 2)]
    await waiting(running, 2)
    refused = await running.client.post(path, json=kind.json(1, 3))
    assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    running.fakes.runner(kind).gate.set()
    assert [(await task).status_code for task in tasks] == [200, 200]


async def test_a_failing_row_does_not_hurt_its_batch_mates(running: Running, kind: Kind) -> None:
    paths = [f"/v1/sessions/{await running.prefilled(kind, 3)}/prefill" for _ in range(4)]
    other = f"/v1/sessions/{await running.prefilled(kind, 3)}/step"
    runner = running.fakes.runner(kind)
    runner.gate.clear()
    first = asyncio.create_task(running.client.post(other, json=kind.json(1, 3)))
    await waiting(running, 1)
    bodies = [kind.json(1, 3, poison=i == 2) for i in range(4)]
    tasks = [asyncio.create_task(running.client.post(p, json=b)) for p, b in zip(paths, bodies, strict=True)]
    await waiting(running, 5)
    runner.gate.set()
    assert (await first).status_code == 200
    assert [(await task).status_code for task in tasks] == [200, 200, 500, 200]
    assert len(runner.batches[-4:]) == 4, "each ran again by itself"
    lengths = [(await running.client.get(path.removesuffix("/prefill"))).json()["valid_length"] for path in paths]
    assert lengths == [[4], [4], [3], [4]]


async def test_a_reader_who_leaves_before_the_schedule_takes_the_append_along(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 3)
    path = f"/v1/sessions/{session_id}/step"
    runner = running.fakes.runner(kind)
    runner.gate.clear()
    runner.entered.clear()
    runs = RawRequest(running.app, path, kind.json(1, 3))
    await asyncio.to_thread(runner.entered.wait)
    waits = RawRequest(running.app, path, kind.json(1, 4))
    await waiting(running, 2)
    for request in (runs, waits):
        request.leave()
    await waits.task
    assert (waits.status, runs.status) == (0, 0), "nobody is answered"
    runner.gate.set()
    await runs.task
    assert runs.status == 200, "what ran has committed and says so to nobody"
    await until(lambda: running.fakes.engine.idle)
    session = running.fakes.engine.session(session_id)
    assert (session.valid_length, session.version) == ([4], 2)


async def test_a_reader_who_leaves_amid_the_body_changes_nothing(running: Running) -> None:
    session_id = await running.prefilled(DECODER, 3)
    before = running.state()
    request = RawRequest(running.app, f"/v1/sessions/{session_id}/step", {})
    request._inbox.get_nowait()
    request._inbox.put_nowait({"type": "http.request", "body": b'{"token_ids', "more_body": True})
    request.leave()
    await request.task
    assert request.status == 0
    assert running.state() == before


@pytest.mark.parametrize("stream", [True, False])
async def test_a_generation_ends_when_its_reader_leaves(running: Running, stream: bool) -> None:
    session_id = await running.prefilled(DECODER, 3)
    running.fakes.decoder.hold(3)
    body = {"max_tokens": 90, "stream": stream}
    request = RawRequest(running.app, f"/v1/sessions/{session_id}/generate", body)
    await asyncio.to_thread(running.fakes.decoder.held.wait)
    request.leave()
    await request.task
    running.fakes.decoder.gate.set()
    await until(lambda: running.fakes.engine.idle)
    session = running.fakes.engine.session(session_id)
    assert (session.state, session.valid_length[0]) in [("idle", 5), ("idle", 6)]
    assert (request.body.count(b"data:") > 0) == stream


async def test_drain_finishes_what_runs_and_refuses_what_is_new(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}"
    runner = running.fakes.runner(kind)
    runner.gate.clear()
    appends = [asyncio.create_task(running.client.post(f"{path}/step", json=kind.json(1, past))) for past in (3, 4)]
    await waiting(running, 2)
    stop = asyncio.create_task(running.service.stop())
    await until(lambda: running.service.status == "draining")
    refusals = [
        await running.client.post(f"{path}/step", json=kind.json(1, 3)),
        await running.client.post("/v1/sessions", json={"model": kind.model}),
        await running.client.post(f"{path}/fork", json={}),
    ]
    for reply in refusals:
        assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "engine_stopped", "1")
    ready = await running.client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    assert (await running.client.get("/livez")).status_code == 200
    assert (await running.client.get(path)).status_code == 200, "what is there can be read"
    runner.gate.set()
    assert [(await task).status_code for task in appends] == [200, 200]
    await stop
    assert running.service.status == "down"


@pytest.mark.parametrize("stream", [True, False])
async def test_drain_cuts_generations_short(start: Start, stream: bool) -> None:
    running = await start(settings={"drain_seconds": 0.05})
    session_id = await running.prefilled(DECODER, 3)
    running.fakes.decoder.hold(3)
    body = {"max_tokens": 90, "stream": stream}
    generation = asyncio.create_task(running.client.post(f"/v1/sessions/{session_id}/generate", json=body))
    await asyncio.to_thread(running.fakes.decoder.held.wait)
    stop = asyncio.create_task(running.service.stop())
    await asyncio.sleep(0.1)
    running.fakes.decoder.gate.set()
    reply = await generation
    await stop
    assert reply.status_code == 200
    assert '"finish_reason":["cancelled"]' in reply.text
    length = running.fakes.engine.session(session_id).valid_length[0]
    assert 5 <= length < 20


async def test_what_waits_when_the_time_is_up_is_refused(start: Start) -> None:
    """An append that waits for blocks ends with 503, before the pool's own deadline."""
    running = await start(blocks=4, settings={"drain_seconds": 0.05, "cancel_seconds": 0.05})
    await running.prefilled(DECODER, 12)
    path = f"/v1/sessions/{await running.session('letters')}/prefill"
    append = asyncio.create_task(running.client.post(path, json=DECODER.json(5)))
    await waiting(running, 1)
    await running.service.stop()
    reply = await append
    assert (reply.status_code, reply.json()["code"]) == (503, "engine_stopped")


class Broken(BaseException):
    """Not an Exception: what the engine does not take for the model's own failure."""


async def test_when_the_engine_dies_everybody_is_told(
    running: Running, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}/step"
    runner = running.fakes.runner(kind)
    runner.gate.clear()
    runner.entered.clear()
    appends = [asyncio.create_task(running.client.post(path, json=kind.json(1, past))) for past in (3, 4)]
    await waiting(running, 2)
    await asyncio.to_thread(runner.entered.wait)
    runner.broken = Broken()
    runner.gate.set()
    for append in appends:
        reply = await append
        assert (reply.status_code, reply.json()["code"]) == (503, "engine_stopped")
    await until(lambda: running.service.status == "down")
    ready = await running.client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "down")
    assert (await running.client.post(path, json=kind.json(1, 3))).status_code == 503
    assert any(record.levelno == logging.ERROR for record in caplog.records)
