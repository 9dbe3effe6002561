"""The stream of events: what is told to whom, resumed, missed, refused; and readers that are slow or gone."""

import asyncio
import json
from typing import Any

import pytest

from keypast.schemas import Event
from tests.service.conftest import Running, Start, until
from tests.service.fakes import KINDS, Kind
from tests.service.raw_client import RawRequest
from tests.service.tenants import KEYS, as_tenant

pytestmark = pytest.mark.anyio


class Reader(RawRequest):
    """`events` are those that have come, each checked against its `id:` and `event:` lines."""

    def __init__(self, running: Running, after: str | None = None, **headers: str) -> None:
        resumed = {} if after is None else {"last-event-id": after}
        super().__init__(running.app, "/v1/events", headers=resumed | headers)

    @property
    def events(self) -> list[Event]:
        told = []
        for block in self.body.decode().split("\n\n"):
            if block and not block.startswith(":"):
                name, kind, data = block.split("\n")
                event = Event.model_validate_json(data.removeprefix("data: "))
                assert (name, kind) == (f"id: {event.id}", f"event: {event.type}")
                told.append(event)
        return told

    @property
    def types(self) -> list[str]:
        return [event.type for event in self.events]

    async def got(self, count: int) -> list[Event]:
        await until(lambda: len(self.events) >= count)
        return self.events

    async def open(self) -> "Reader":
        await until(lambda: self.status != 0 or self.task.done())
        return self

    async def end(self) -> None:
        self.leave()
        await asyncio.wait_for(self.task, 10)


async def test_a_life_as_it_happens(running: Running, kind: Kind) -> None:
    reader = await Reader(running).open()
    session_id = await running.prefilled(kind, 5)
    path = f"/v1/sessions/{session_id}"
    client = running.client
    child = (await client.post(f"{path}/fork", json={"at": 3})).json()["sessions"][0]["id"]
    await client.post(f"{path}/step", json=kind.json(1, 5))
    await client.post(f"{path}/score", json=kind.json(1, 6))
    await client.post(f"{path}/truncate", json={"length": 2})
    past = await client.get(f"{path}/past")
    copy = await running.session(kind)
    headers = {"content-type": past.headers["content-type"]}
    await client.put(f"/v1/sessions/{copy}/past", content=past.content, headers=headers)
    await client.delete(path)
    events = await reader.got(9)
    assert [(e.type, e.session_id, e.version, e.valid_length, e.parent) for e in events] == [
        ("created", session_id, 0, [0], None),
        ("committed", session_id, 1, [5], None),
        ("forked", child, 0, [3], session_id),
        ("committed", session_id, 2, [6], None),
        ("truncated", session_id, 3, [2], None),
        ("exported", session_id, 3, [2], None),
        ("created", copy, 0, [0], None),
        ("imported", copy, 1, [2], None),
        ("deleted", session_id, 3, [2], None),
    ]
    assert {event.model for event in events} == {kind.model}
    await reader.end()


async def test_expiry_is_told_without_anybody_asking(running: Running) -> None:
    reader = await Reader(running).open()
    await running.session("echo", ttl_seconds=0.02)
    assert [event.type for event in await reader.got(2)] == ["created", "expired"]
    await reader.end()


async def test_every_token_of_a_generation(running: Running) -> None:
    reader = await Reader(running).open()
    path = f"/v1/sessions/{await running.prefilled(KINDS['decoder'], 2)}"
    await running.client.post(f"{path}/generate", json={"max_tokens": 3})
    assert [event.valid_length for event in await reader.got(5)] == [[0], [2], [3], [4], [5]]
    await reader.end()


async def test_a_reader_who_comes_back_misses_nothing(running: Running) -> None:
    first = await Reader(running).open()
    for name in "abc":
        await running.session("echo", id=name)
    seen = (await first.got(3))[:2]
    await first.end()
    await running.session("echo", id="d")
    second = await Reader(running, after=seen[-1].id).open()
    await running.session("echo", id="e")
    assert [event.session_id for event in seen + await second.got(3)] == list("abcde")
    await second.end()


async def test_without_an_id_it_begins_now(running: Running) -> None:
    await running.session("echo", id="a")
    reader = await Reader(running).open()
    await running.session("echo", id="b")
    assert [event.session_id for event in await reader.got(1)] == ["b"]
    await reader.end()


async def test_what_the_ring_has_lost_is_announced(start: Start) -> None:
    running: Running = await start(event_ring=3)
    first = await Reader(running).open()
    await running.session("echo", id="a")
    seen = (await first.got(1))[0].id
    await first.end()
    for name in "bcdef":
        await running.session("echo", id=name)
    for after, lost in ((seen, 2), ("00000000-9", None)):
        reader = await Reader(running, after=after).open()
        gap, *rest = await reader.got(4)
        assert (gap.type, gap.lost, gap.session_id) == ("gap", lost, None)
        assert [event.session_id for event in rest] == list("def")
        await reader.end()


async def test_a_slow_reader_holds_up_nobody_and_is_told_of_its_gap(start: Start) -> None:
    running: Running = await start(event_ring=4)
    slow, quick = await Reader(running).open(), await Reader(running).open()
    slow.reading.clear()
    path = f"/v1/sessions/{await running.prefilled(KINDS['decoder'], 2)}"
    for at in range(40):
        assert (await running.client.post(f"{path}/step", json=KINDS["decoder"].json(1, 2 + at))).status_code == 200
        await quick.got(3 + at)
    slow.reading.set()
    await until(lambda: bool(slow.events) and slow.events[-1].valid_length == [42])
    told = sum(1 if event.lost is None else event.lost for event in slow.events)
    assert (told, slow.types.count("gap"), "gap" in quick.types) == (42, 1, False)
    for reader in (slow, quick):
        await reader.end()


async def test_silence_is_filled_with_comments(start: Start) -> None:
    running: Running = await start(settings={"ping_seconds": 0.01})
    reader = await Reader(running).open()
    await until(lambda: reader.body.count(b": ping\n\n") > 3)
    assert reader.events == []
    await reader.end()


async def test_open_streams_are_counted(start: Start) -> None:
    running: Running = await start(settings={"max_event_streams": 2})
    readers = [await Reader(running).open() for _ in range(2)]
    for _ in range(2):
        refused = await running.client.get("/v1/events")
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
    await readers[0].end()
    reader = await Reader(running).open()
    assert reader.status == 200
    for one in (reader, readers[1]):
        await one.end()


async def test_a_reader_who_leaves_while_events_pour_in_is_let_go(start: Start) -> None:
    running: Running = await start(settings={"max_event_streams": 1})
    reader = await Reader(running).open()
    path = f"/v1/sessions/{await running.prefilled(KINDS['decoder'], 2)}"
    pouring = asyncio.create_task(running.client.post(f"{path}/generate", json={"max_tokens": 90}))
    await reader.got(5)
    await reader.end()
    assert (await Reader(running).open()).status == 200
    await pouring


async def test_only_the_callers_own(start: Start) -> None:
    running: Running = await start(settings={"keys": KEYS})
    own, other = [await Reader(running, **as_tenant(name)).open() for name in "ab"]
    for name in "ab":
        created = await running.client.post("/v1/sessions", json={"model": "echo"}, headers=as_tenant(name))
        assert created.status_code == 201
    events = [(await reader.got(1))[0] for reader in (own, other)]
    assert events[0].id != events[1].id
    assert events[0].session_id != events[1].session_id
    stolen = await Reader(running, after=events[1].id, **as_tenant("a")).open()
    assert [(event.type, event.lost) for event in await stolen.got(2)] == [("gap", None), ("created", None)]
    assert stolen.events[1].session_id == events[0].session_id
    for reader in (own, other, stolen):
        assert len(reader.events) <= 2
        await reader.end()


@pytest.mark.parametrize("wrong", ["1", "-1", "nothing", "0123abcd-1e3", "0123abcd-" + "9" * 19, "x" * 500])
async def test_what_is_no_id_is_refused(running: Running, wrong: str) -> None:
    reply = await running.client.get("/v1/events", headers={"last-event-id": wrong})
    assert (reply.status_code, reply.json()["field"]) == (422, "Last-Event-ID")


async def test_a_head_request_ends(running: Running) -> None:
    reply = await asyncio.wait_for(running.client.head("/v1/events"), 5)
    assert (reply.status_code, reply.content) == (200, b"")
    assert reply.headers["content-type"].startswith("text/event-stream")


async def test_a_drain_ends_the_stream_after_the_last_commit(running: Running) -> None:
    kind = KINDS["decoder"]
    path = f"/v1/sessions/{await running.prefilled(kind, 2)}"
    reader = await Reader(running).open()
    runner = running.fakes.decoder
    runner.entered.clear()
    runner.gate.clear()
    step = asyncio.create_task(running.client.post(f"{path}/step", json=kind.json(1, 2)))
    await asyncio.to_thread(runner.entered.wait)
    stopping = asyncio.create_task(running.service.stop())
    await asyncio.sleep(0.01)
    runner.gate.set()
    await asyncio.wait_for(reader.task, 10)
    await stopping
    assert (await step).status_code == 200
    assert [(event.type, event.valid_length) for event in reader.events] == [("committed", [3])]
    late = await running.client.get("/v1/events")
    assert (late.status_code, late.json()["code"]) == (503, "engine_stopped")


async def test_the_document_describes_an_event(running: Running) -> None:
    document: dict[str, Any] = (await running.client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/events"]["get"]
    assert operation["parameters"][0]["name"] == "Last-Event-ID"
    assert "text/event-stream" in operation["responses"]["200"]["content"]
    assert "lost" in json.dumps(document["components"]["schemas"]["Event"])
