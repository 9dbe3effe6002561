"""Create, list, read, delete, fork, truncate."""

import pytest

from engine.config import Quota
from keypast.schemas import ForkReply, ModelList, Receipt, SessionPage, SessionView
from tests.service.conftest import Running, Start
from tests.service.fakes import H, Kind

pytestmark = pytest.mark.anyio


async def test_create_says_what_it_made_and_where(running: Running, kind: Kind) -> None:
    body = {
        "model": kind.model,
        "id": "mine_1",
        "batch_size": 2,
        "max_length": 9,
        "ttl_seconds": 60.0,
        "labels": {"team": "a"},
    }
    reply = await running.client.post("/v1/sessions", json=body)
    assert reply.status_code == 201
    assert reply.headers["location"] == "/v1/sessions/mine_1"
    assert reply.headers["etag"] == '"0"'
    view = SessionView.model_validate_json(reply.content)
    assert (view.id, view.model, view.state, view.valid_length, view.max_length) == (
        "mine_1",
        kind.model,
        "idle",
        [0, 0],
        9,
    )
    assert view.expires_at is not None
    assert (view.expires_at - view.last_used_at).total_seconds() == pytest.approx(60)
    read = await running.client.get(reply.headers["location"])
    assert (read.status_code, read.headers["etag"], read.json()) == (200, '"0"', reply.json())


async def test_minted_ids_cannot_be_guessed(running: Running) -> None:
    ids = {await running.session("echo") for _ in range(20)}
    assert len(ids) == 20
    assert all(len(session_id) >= 20 for session_id in ids)


async def test_delete_gives_a_receipt_then_410(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 5)
    reply = await running.client.delete(f"/v1/sessions/{session_id}")
    receipt = Receipt.model_validate_json(reply.content)
    assert (reply.status_code, receipt.id, receipt.positions, receipt.blocks_freed) == (200, session_id, 5, 2)
    gone = await running.client.delete(f"/v1/sessions/{session_id}")
    assert (gone.status_code, gone.json()["reason"]) == (410, "deleted")


async def test_an_expired_session_is_gone_with_its_reason(running: Running) -> None:
    session_id = await running.session("echo", ttl_seconds=1e-6)
    reply = await running.client.get(f"/v1/sessions/{session_id}")
    assert (reply.status_code, reply.json()["reason"]) == (410, "expired")


async def test_pages_hold_every_session_once(running: Running) -> None:
    ids = [await running.session("echo") for _ in range(7)]
    seen: list[str] = []
    cursor = None
    while True:
        reply = await running.client.get("/v1/sessions", params={"limit": 3, **({"cursor": cursor} if cursor else {})})
        page = SessionPage.model_validate_json(reply.content)
        seen += [view.id for view in page.data]
        if page.next_cursor is None:
            break
        if cursor is None:  # what is deleted meanwhile, the cursor's own session even, hides no other
            await running.client.delete(f"/v1/sessions/{page.data[-1].id}")
        cursor = page.next_cursor
    assert seen == ids


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, ["a", "b", "c"]),
        ({"model": "echo"}, ["a", "b"]),
        ({"model": "nobody"}, []),
        ({"label": "team"}, ["a", "c"]),
        ({"label": "team=red"}, ["a"]),
        ({"label": ["team", "shift=night"]}, ["c"]),
        ({"state": "idle"}, ["a", "b", "c"]),
        ({"state": "running"}, []),
    ],
)
async def test_filters(running: Running, query: dict[str, str], found: list[str]) -> None:
    await running.session("echo", id="a", labels={"team": "red"})
    await running.session("echo", id="b")
    await running.session("letters", id="c", labels={"team": "blue", "shift": "night"})
    reply = await running.client.get("/v1/sessions", params=query)
    assert [session["id"] for session in reply.json()["data"]] == found


async def test_forks_share_until_they_write(running: Running, kind: Kind) -> None:
    parent = await running.prefilled(kind, 6)
    reply = await running.client.post(f"/v1/sessions/{parent}/fork", json={"count": 2})
    assert reply.status_code == 201
    children = ForkReply.model_validate_json(reply.content).sessions
    assert [(child.parent, child.valid_length, child.shared_blocks) for child in children] == [(parent, [6], 2)] * 2
    await running.client.post(f"/v1/sessions/{children[0].id}/step", json=kind.json(1, 6))
    lengths = [(await running.client.get(f"/v1/sessions/{s}")).json()["valid_length"] for s in (parent, children[0].id)]
    assert lengths == [[6], [7]]


async def test_fork_at_an_earlier_length(running: Running, kind: Kind) -> None:
    parent = await running.prefilled(kind, 6, batch_size=2)
    reply = await running.client.post(f"/v1/sessions/{parent}/fork", json={"at": [4, 0]})
    assert reply.json()["sessions"][0]["valid_length"] == [4, 0]


async def test_truncate_rolls_back_and_counts_as_a_version(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 6, batch_size=2)
    reply = await running.client.post(f"/v1/sessions/{session_id}/truncate", json={"length": [6, 3]})
    assert (reply.status_code, reply.headers["etag"]) == (200, '"2"')
    assert (reply.json()["valid_length"], reply.json()["version"]) == ([6, 3], 2)


async def test_if_match_guards_every_change(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 6)
    path, stale, present = f"/v1/sessions/{session_id}", {"if-match": '"0"'}, {"if-match": '"1"'}
    changes = [
        ("POST", "/prefill", kind.json(1, 6)),
        ("POST", "/step", kind.json(1, 6)),
        ("POST", "/truncate", {"length": 1}),
        ("POST", "/fork", {}),
        ("DELETE", "", None),
        ("GET", "", None),
    ]
    before = running.state()
    for method, verb, body in changes:
        reply = await running.client.request(method, path + verb, json=body, headers=stale)
        assert reply.status_code == 412, verb
        assert (reply.json()["version"], reply.json()["valid_length"], reply.headers["etag"]) == (1, [6], '"1"')
    assert running.state() == before
    for method, verb, body in [changes[3], changes[5], changes[1]]:
        reply = await running.client.request(method, path + verb, json=body, headers=present)
        assert reply.is_success, reply.text
    assert (await running.client.delete(path, headers={"if-match": "*"})).status_code == 200


async def test_models_tell_their_inputs(running: Running) -> None:
    reply = await running.client.get("/v1/models")
    cards = {card.id: card for card in ModelList.model_validate_json(reply.content).data}
    assert (cards["echo"].kind, cards["letters"].vocab_size) == ("attention", 259)
    assert cards["echo"].inputs[0].shape == ["B", "n", H]
    assert cards["echo"].inputs[3].required is False
    assert cards["letters"].created > 0


async def test_capacity_counts_blocks_and_bytes(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 6)
    await running.client.post(f"/v1/sessions/{session_id}/fork", json={})
    reply = (await running.client.get("/v1/capacity")).json()
    pool = next(pool for pool in reply["pools"] if pool["model"] == kind.model)
    assert pool["blocks"] == {"total": 63, "free": 61, "used": 2, "shared": 2, "reserved": 0}
    block_bytes = 4 * running.fakes.runner(kind).spec.kv.position_bytes
    assert pool["bytes"]["used"] == 2 * block_bytes
    assert reply["sessions"] == 2


async def test_too_many_sessions_is_429(start: Start) -> None:
    running = await start(max_sessions=2)
    parent = await running.session("echo")
    await running.session("echo")
    for reply in (
        await running.client.post("/v1/sessions", json={"model": "echo"}),
        await running.client.post(f"/v1/sessions/{parent}/fork", json={}),
    ):
        assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (429, "queue_full", "1")


async def test_patch_is_a_merge_patch(running: Running) -> None:
    session_id = await running.session("echo", ttl_seconds=60.0, labels={"a": "1", "b": "2"})
    path = f"/v1/sessions/{session_id}"
    reply = await running.client.patch(
        path,
        content=b'{"labels": {"a": null, "c": "3"}, "pinned": true}',
        headers={"content-type": "application/merge-patch+json", "if-match": '"0"'},
    )
    view = SessionView.model_validate_json(reply.content)
    assert (reply.status_code, reply.headers["etag"], view.version) == (200, '"0"', 0)
    assert (view.labels, view.ttl_seconds, view.pinned, view.expires_at) == ({"b": "2", "c": "3"}, 60, True, None)
    reply = await running.client.patch(path, json={"pinned": None, "labels": None})
    view = SessionView.model_validate_json(reply.content)
    assert (view.labels, view.ttl_seconds, view.pinned) == ({}, 60, False)
    assert view.expires_at is not None
    reply = await running.client.patch(path, json={"ttl_seconds": None})
    assert reply.json()["expires_at"] is None
    assert (await running.client.get(path)).json() == reply.json()


async def test_a_patch_that_does_not_hold_changes_nothing(running: Running) -> None:
    session_id = await running.session("echo", labels={"a": "1"})
    path = f"/v1/sessions/{session_id}"
    before = (await running.client.get(path)).json()
    for body, field in (
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": -1}, "ttl_seconds"),
        ({"ttl_seconds": 1e300}, "ttl_seconds"),
        ({"ttl_seconds": "5"}, "ttl_seconds"),
        ({"ttl_seconds": True}, "ttl_seconds"),
        ({"pinned": 1}, "pinned"),
        ({"labels": {"b": 2}}, "labels.b"),
        ({"labels": {str(n): "" for n in range(32)}}, "labels"),
        ({"model": "letters"}, "model"),
    ):
        reply = await running.client.patch(path, json={**body, "labels": body.get("labels", {"b": "2"})})
        assert (reply.status_code, reply.json()["field"]) == (422, field)
    moved = await running.client.patch(path, json={"pinned": True}, headers={"if-match": '"7"'})
    assert (moved.status_code, moved.json()["version"]) == (412, 0)
    assert (await running.client.get(path)).json() == before
    assert (await running.client.patch("/v1/sessions/nobody", json={})).status_code == 404


async def test_pins_beyond_the_quota_are_429(start: Start) -> None:
    running = await start(quota=Quota(pinned=1))
    await running.session("echo", pinned=True)
    other = await running.session("echo")
    for reply in (
        await running.client.post("/v1/sessions", json={"model": "echo", "pinned": True}),
        await running.client.patch(f"/v1/sessions/{other}", json={"pinned": True}),
    ):
        assert (reply.status_code, reply.json()["code"]) == (429, "quota_exceeded")
        assert int(reply.headers["retry-after"]) >= 1
