"""The service in this process and a plain model of its sessions: requests that can come twice or get lost, and what
must hold after each. What happens to them is drawn in test_machine."""

import asyncio
import json
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import httpx
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant

from engine.config import EngineConfig
from engine.engine import Engine
from keypast.past import Past
from service.app import create_app
from service.lifecycle import Loaded, Service
from service.settings import Settings
from service.text import TextModel
from tests.fakes import FaultyQuotas
from tests.service.conftest import until
from tests.service.fakes import byte_tokenizer
from tests.service.faults import LossyTransport, Stop, TickingClock, Voice, fake_voices

T = TypeVar("T")
BLOCKS, BLOCK_SIZE = 24, 4
Guard = Literal["none", "key", "version"]


@dataclass
class Told:
    """What a session must hold."""

    voice: Voice
    rows: list[list[int]]
    version: int = 0
    max_length: int = 60
    ttl: float | None = None
    pinned: bool = False

    @property
    def lengths(self) -> list[int]:
        return list(map(len, self.rows))

    def with_more(self, new: list[list[int]]) -> list[list[int]]:
        return [row + more for row, more in zip(self.rows, new, strict=True)]


@dataclass
class Sent:
    """A request that can be sent again: the same bytes, the same headers."""

    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes | None:
        return self.body if self.body is None or isinstance(self.body, bytes) else json.dumps(self.body).encode()


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["code"]


def is_replay(reply: httpx.Response) -> bool:
    return "true" in reply.headers.get_list("idempotent-replayed")


class House(RuleBasedStateMachine):
    """The service in this process, and what its sessions must hold. Its rules are in test_machine."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = TickingClock()
        self.quotas = FaultyQuotas()
        self.voices = fake_voices(BLOCKS, BLOCK_SIZE)
        self.tokenizer = byte_tokenizer()
        self.told: dict[str, Told] = {}
        self.gone: dict[str, str] = {}  # and why
        self.seen: dict[str, dict[str, Any]] = {}  # at the last look
        self.keys = 0
        self.exits = AsyncExitStack()
        self.loop = asyncio.Runner()
        config = EngineConfig(block_size=BLOCK_SIZE, token_budget=8, wait_seconds=1e-9, quotas=self.quotas)
        self.engine = Engine([voice.runner for voice in self.voices], config, self.clock)
        self.do(self.start())

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        """Fails by a time limit of its own: the suite's would end no example."""
        return self.loop.run(asyncio.wait_for(what, 10))

    async def start(self) -> None:
        texts = {voice.name: TextModel(self.tokenizer) for voice in self.voices if voice.speaks}
        self.app = create_app(lambda progress: Loaded(self.engine, texts), Settings(drain_seconds=1.0))
        await self.exits.enter_async_context(self.app.router.lifespan_context(self.app))
        self.wire = LossyTransport(httpx.ASGITransport(self.app, raise_app_exceptions=False))
        client = httpx.AsyncClient(transport=self.wire, base_url="http://k")
        self.client = await self.exits.enter_async_context(client)
        service: Service = self.app.state.service
        await service.loaded()

    # Requests.

    async def send(self, sent: Sent) -> httpx.Response:
        return await self.client.request(sent.method, sent.path, content=sent.content, headers=sent.headers)

    async def once(self, sent: Sent, lost: bool = False) -> httpx.Response:
        """Sends it, and again if it can be known again: what was done is told again and not done again."""
        known = sent.headers.keys() & {"idempotency-key", "if-match"}
        first: httpx.Response | None = None
        if known and lost:
            self.wire.losing = True
            with pytest.raises(httpx.ReadError):
                await self.send(sent)
            self.wire.losing = False
        else:
            first = await self.send(sent)
            assert not is_replay(first)
        if not known or (first is not None and not first.is_success):
            assert first is not None
            return first
        again = await self.send(sent)
        if again.is_success and not is_replay(again) and await self.is_where(sent):
            return again  # nothing was committed, so nothing is known again: it did nothing twice
        assert is_replay(again) == again.is_success
        if first is not None:
            assert (again.status_code, again.content) == (first.status_code, first.content)
            assert again.headers.get("etag") == first.headers.get("etag")
        return again

    async def is_where(self, sent: Sent) -> bool:
        """Whether the session is at the version that the request expects."""
        session = (await self.client.get("/".join(sent.path.split("/")[:4]))).json()
        return sent.headers.get("if-match") == f'"{session.get("version")}"'

    def guarded(self, sent: Sent, guard: Guard, version: int) -> Sent:
        if guard == "key":
            self.keys += 1
            sent.headers["idempotency-key"] = f"k{self.keys}"
        elif guard == "version":
            sent.headers["if-match"] = f'"{version}"'
        return sent

    def appending(self, session: str, verb: str, rows: list[list[int]], at: Told | None = None) -> Sent:
        told = at or self.told[session]
        most = max(map(len, rows))
        body = told.voice.append([row + [0] * (most - len(row)) for row in rows], told.lengths)
        if len(set(map(len, rows))) > 1:
            body["batch_valid_length"] = list(map(len, told.with_more(rows)))
        return Sent("POST", f"/v1/sessions/{session}/{verb}", body)

    async def room(self, session: str, new: list[int]) -> tuple[bool, bool]:
        """Whether so many positions fit into the free blocks for sure, and whether they may."""
        told = self.told[session]
        pools = (await self.client.get("/v1/capacity")).json()["pools"]
        free = next(pool["own"]["available"] for pool in pools if pool["model"] == told.voice.name)
        counts = [
            (-(-(length + more) // BLOCK_SIZE) + -length // BLOCK_SIZE, bool(more and length % BLOCK_SIZE))
            for length, more in zip(told.lengths, new, strict=True)
        ]
        least = sum(grow for grow, _ in counts)
        return least + sum(copies for _, copies in counts) <= free, least <= free

    def refusal(self, session: str, verb: str, after: list[int]) -> tuple[int, str] | None:
        told = self.told[session]
        if verb == "step" and not all(told.rows):
            return 409, "wrong_state"
        if max(after) > told.max_length or sum(-(-length // BLOCK_SIZE) for length in after) > BLOCKS - 1:
            return 422, "length_exceeded"
        return None

    def commit(self, session: str, rows: list[list[int]]) -> None:
        told = self.told[session]
        told.rows, told.version = rows, told.version + 1

    # What is drawn.

    def pick(self, number: int, *, speaks: bool = False) -> str:
        """Any session, by number: simpler to shrink than a bundle, and never out of them."""
        fitting = [session for session, told in self.told.items() if told.voice.speaks or not speaks]
        if not fitting:
            return self.do(self.make(self.voices[0], 1, 60, "none", False))
        return fitting[number % len(fitting)]

    def draw_rows(self, session: str, data: st.DataObject, most: int) -> list[list[int]]:
        told = self.told[session]
        positions = st.integers(0, told.voice.positions - 1)
        rows = [data.draw(st.lists(positions, max_size=most)) for _ in told.rows]
        if not any(rows):
            rows[0] = [1]
        return rows

    async def make(self, voice: Voice, rows: int, max_length: int, guard: Guard, lost: bool) -> str:
        body = {"model": voice.name, "batch_size": rows, "max_length": max_length}
        reply = await self.once(self.guarded(Sent("POST", "/v1/sessions", body), guard, 0), lost)
        assert reply.status_code == 201
        session: str = reply.json()["id"]
        self.told[session] = Told(voice, [[] for _ in range(rows)], max_length=max_length)
        return session

    def answered(
        self, session: str, body: dict[str, Any], after: list[list[int]], rows: list[list[int]], version: int
    ) -> None:
        """A reply to an append, before the commit is told of."""
        told = self.told[session]
        assert (body["past_length"], body["valid_length"]) == (told.lengths, list(map(len, after)))
        assert body["version"] == version
        told.voice.check(body["outputs"], after, rows)

    async def failing(self, session: str, sent: Sent, stop: Stop, skip: int) -> tuple[bool, httpx.Response]:
        """The reply to a request that fails at that stop, if it comes so far, and whether it did."""
        runner = self.told[session].voice.runner
        speaks = self.told[session].voice.speaks
        try:
            if stop in ("admit", "reserve"):
                self.quotas.fail(1 + skip, on_engine=stop == "reserve")
                reply = await self.send(sent)
                return self.quotas.fired, reply
            if stop == "encode" and speaks:
                self.tokenizer.broken = RuntimeError("cannot be written")
                reply = await self.send(sent)
                return reply.status_code == 500, reply
            runner.fail(stop, session, 0 if stop == "encode" else skip)
            reply = await self.send(sent)
            return runner.fired, reply
        finally:
            self.quotas.mend()
            runner.mend()
            self.tokenizer.broken = None

    # What must hold.

    async def look(self, *, as_before: bool = False) -> None:
        """Each session is as told, and answers as its history makes it; asking leaves it as it is, block by block.
        `as_before`: nothing at all has changed since the last look."""
        await until(lambda: self.engine.idle)
        self.engine.check()
        listed = (await self.client.get("/v1/sessions")).json()["data"]  # which ends those whose time is over
        assert {view["id"] for view in listed} == self.told.keys()
        found = await self.views()
        for session, told in self.told.items():
            info = found[session]
            assert (info["valid_length"], info["version"], info["state"]) == (told.lengths, told.version, "idle")
            assert (info["ttl_seconds"], info["pinned"]) == (told.ttl, told.pinned)
        if as_before:  # one that was made since has not been looked at
            assert found == {session: self.seen.get(session, view) for session, view in found.items()}
        await asyncio.gather(*(self.probe(session) for session in self.told))
        self.seen = await self.views()
        assert self.seen == found
        for session, reason in list(self.gone.items())[-2:]:
            reply = await self.client.get(f"/v1/sessions/{session}")
            assert (code(reply), reply.json()["reason"]) == ((410, "session_gone"), reason)

    async def views(self) -> dict[str, dict[str, Any]]:
        """Of each session, but for when it was used."""
        views = {}
        for session in self.told:
            view = (await self.client.get(f"/v1/sessions/{session}")).json()
            views[session] = {name: value for name, value in view.items() if name not in ("last_used_at", "expires_at")}
        return views

    async def probe(self, session: str) -> None:
        told = self.told[session]
        body, new, queries = told.voice.ask(told.lengths)
        after = told.with_more(new)
        reply = await self.send(Sent("POST", f"/v1/sessions/{session}/score", body))
        refusal = self.refusal(session, "score", list(map(len, after)))
        if reply.is_success:
            told.voice.check(reply.json()["outputs"], after, queries)
        elif any(told.rows):
            assert code(reply) in (refusal, (429, "pool_exhausted"))
            past = Past.from_bytes((await self.client.get(f"/v1/sessions/{session}/past")).content)
            kept = zip(past.arrays["token_ids"].tolist(), told.lengths, strict=True)
            assert [ids[:length] for ids, length in kept] == told.rows

    @invariant()
    def everything_is_as_told(self) -> None:
        self.do(self.look())
        for voice in self.voices:
            assert getattr(voice.runner.inner, "faults", []) == []

    def teardown(self) -> None:
        async def end() -> None:
            for voice in self.voices:
                voice.runner.release()
            try:
                for session in self.told:
                    assert (await self.client.delete(f"/v1/sessions/{session}")).status_code == 200
                await until(lambda: self.engine.idle)
                self.engine.check()
                assert all(pool.free == pool.total for pool in self.engine.capacity().models)
            finally:
                await self.exits.aclose()

        try:
            self.do(end())
        finally:
            self.loop.close()
