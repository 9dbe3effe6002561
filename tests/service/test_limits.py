"""Quotas and load beyond capacity, over the real application."""

import asyncio
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from engine.config import Quota
from keypast.past import Past
from keypast.schemas import Capacity
from tests.service.conftest import Running, Start
from tests.service.fakes import KINDS
from tests.service.tenants import KEYS, as_tenant

pytestmark = pytest.mark.anyio

DECODER = KINDS["decoder"]


async def test_capacity_is_the_callers_quota_and_use(start: Start) -> None:
    quotas = {"a": Quota(sessions=3, blocks=20, guaranteed_blocks=8, positions_per_minute=6000)}
    running = await start(blocks=64, quotas=quotas, settings={"keys": KEYS})
    for tenant, n in (("a", 5), ("b", 40)):
        headers = as_tenant(tenant)
        session = {"model": "letters", "id": "mine", "pinned": tenant == "a"}
        await running.client.post("/v1/sessions", json=session, headers=headers)
        reply = await running.client.post("/v1/sessions/mine/prefill", json=DECODER.json(n), headers=headers)
        assert reply.status_code == 200
    shown = {}
    for tenant in "ab":
        reply = await running.client.get("/v1/capacity", headers=as_tenant(tenant))
        shown[tenant] = Capacity.model_validate_json(reply.content)
    for capacity in shown.values():
        letters = next(pool for pool in capacity.pools if pool.model == "letters")
        assert (letters.blocks.total, letters.blocks.used) == (63, 12)
    own = {tenant: next(pool for pool in shown[tenant].pools if pool.model == "letters").own for tenant in "ab"}
    assert own["a"] is not None
    assert own["b"] is not None
    assert (own["a"].used, own["a"].available) == (2, 18)
    assert (own["b"].used, own["b"].available) == (10, 63 - 12 - 6)
    for tenant, pinned in (("a", 1), ("b", 0)):
        use = shown[tenant].use
        assert use is not None
        assert (use.sessions, use.pinned, use.concurrent_appends) == (1, pinned, 0)
    assert shown["a"].quota is not None
    assert shown["b"].quota is not None
    assert shown["a"].quota.model_dump() == {
        "sessions": 3,
        "pinned": 64,
        "blocks": 20,
        "positions_per_minute": 6000,
        "concurrent_appends": None,
        "guaranteed_blocks": 8,
    }
    assert shown["b"].quota.sessions is None


async def test_a_rate_that_is_passed_says_when_to_come_back(start: Start) -> None:
    running = await start(quota=Quota(positions_per_minute=60))
    session = await running.prefilled(DECODER, 40)
    reply = await running.client.post(f"/v1/sessions/{session}/prefill", json=DECODER.json(50))
    assert (reply.status_code, reply.json()["code"]) == (429, "quota_exceeded")
    assert 28 <= reply.json()["retry_after"] <= 30
    assert reply.headers["retry-after"] == "30"
    assert (await running.client.get(f"/v1/sessions/{session}")).json()["valid_length"] == [40]


async def test_an_evicted_session_is_gone_with_its_reason(start: Start) -> None:
    running = await start(blocks=5, evict="lru")
    first = await running.prefilled(DECODER, 16)
    await running.prefilled(DECODER, 16)
    for verb, body in (("/step", DECODER.json(1)), ("/fork", {}), ("/truncate", {"length": 1})):
        reply = await running.client.post(f"/v1/sessions/{first}{verb}", json=body)
        assert (reply.status_code, reply.json()["code"], reply.json()["reason"]) == (410, "session_gone", "evicted")


class Client:
    """One of many: random verbs on its own sessions, and what it must then find there."""

    def __init__(self, running: Running, tenant: str, number: int) -> None:
        self.http = running.client
        self.headers = as_tenant(tenant)
        self.random = random.Random(number)
        self.told: dict[str, list[int]] = {}
        self.answers: Counter[tuple[int, str]] = Counter()
        self.within_guarantee = tenant == "g"

    async def call(self, method: str, path: str, **body: Any) -> httpx.Response:
        reply = await self.http.request(method, f"/v1/sessions{path}", json=body, headers=self.headers)
        code = reply.json()["code"] if reply.status_code >= 400 else ""
        self.answers[reply.status_code, code] += 1
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) >= 1
        if reply.status_code == 410:
            assert reply.json()["reason"] == "evicted"
            del self.told[path.split("/")[1]]
        return reply

    async def live(self, turns: int, most: int) -> None:
        for _ in range(turns):
            if len(self.told) < 2:
                reply = await self.call("POST", "", model="letters")
                self.told[reply.json()["id"]] = []
            session = self.random.choice(list(self.told))
            told = self.told[session]
            verb = self.random.choice(["prefill", "prefill", "step", "step", "truncate", "fork", "delete", "patch"])
            await getattr(self, f"_{verb}")(session, told, most)

    async def _prefill(self, session: str, told: list[int], most: int) -> None:
        tokens = [self.random.randrange(97, 120) for _ in range(self.random.randint(1, most - len(told) % most))]
        if len(told) + len(tokens) > most:
            return
        reply = await self.call("POST", f"/{session}/prefill", token_ids=[tokens])
        if reply.status_code == 200:
            told += tokens
            assert reply.json()["valid_length"] == [len(told)]

    async def _step(self, session: str, told: list[int], most: int) -> None:
        if told and len(told) < most:
            reply = await self.call("POST", f"/{session}/step", token_ids=[[98]])
            if reply.status_code == 200:
                told.append(98)

    async def _truncate(self, session: str, told: list[int], most: int) -> None:
        length = self.random.randint(0, len(told))
        reply = await self.call("POST", f"/{session}/truncate", length=length)
        if reply.status_code == 200:
            del told[length:]

    async def _fork(self, session: str, told: list[int], most: int) -> None:
        if len(self.told) < 3:
            reply = await self.call("POST", f"/{session}/fork")
            if reply.status_code == 201:
                self.told[reply.json()["sessions"][0]["id"]] = list(told)

    async def _delete(self, session: str, told: list[int], most: int) -> None:
        reply = await self.call("DELETE", f"/{session}")
        if reply.status_code == 200:
            del self.told[session]

    async def _patch(self, session: str, told: list[int], most: int) -> None:
        await self.call("PATCH", f"/{session}", labels={"n": str(len(told))})

    async def compare(self) -> None:
        """What was answered with 200 is there, and nothing else."""
        for session, told in list(self.told.items()):
            reply = await self.call("GET", f"/{session}")
            if reply.status_code == 200:
                assert reply.json()["valid_length"] == [len(told)]
            if told and reply.status_code == 200:
                past = await self.http.get(f"/v1/sessions/{session}/past", headers=self.headers)
                ids = Past.from_bytes(past.content).token_ids
                assert ids is not None
                assert ids[0].tolist() == told


@pytest.mark.parametrize("evict", ["none", "lru"])
async def test_load_beyond_capacity_is_refused_and_never_lost(start: Start, evict: str) -> None:
    """64 clients of four tenants, some 160 sessions of up to 5 blocks each, and 40 blocks."""
    quotas = {"g": Quota(guaranteed_blocks=20, sessions=4), "few": Quota(blocks=9, concurrent_appends=3)}
    running = await start(
        blocks=41, wait_seconds=0.05, evict=evict, quotas=quotas, token_budget=16, settings={"keys": KEYS}
    )
    tenants = ["g", *["few", "x", "y"] * 21]
    clients = [Client(running, tenant, number) for number, tenant in enumerate(tenants)]
    await asyncio.gather(*(client.live(16, 20) for client in clients))
    answers = sum((client.answers for client in clients), Counter[tuple[int, str]]())
    refused = {code for status, code in answers if status == 429}
    assert {status for status, _ in answers} <= {200, 201, 410, 429}
    assert "quota_exceeded" in refused
    assert (evict == "lru") == any(status == 410 for status, _ in answers)
    assert evict == "lru" or "pool_exhausted" in refused
    # 4 sessions of 5 blocks are within the guarantee of 20: that tenant is never refused for what others do
    assert {status for status, _ in clients[0].answers} == {200, 201}, clients[0].answers
    running.fakes.engine.check()
    await asyncio.gather(*(client.compare() for client in clients))
    for client in clients:
        for session in list(client.told):
            await client.call("DELETE", f"/{session}")
    capacity = running.fakes.engine.capacity()
    assert (capacity.sessions, capacity.models[0].used) == (0, 0)
