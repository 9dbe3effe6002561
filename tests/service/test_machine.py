"""Random lives of many sessions over HTTP, with all that goes wrong on the way, against a plain model in memory.

Requests are sent twice, get lost on the way back, expect a version that has passed, are cancelled and left alone, and
fail at every stop of their life. Whatever happens: each session is as told, and what it answers next is what its
history, computed anew, makes it answer.
"""

import asyncio
import json
from typing import Any, Literal, get_args

import httpx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from keypast.past import Past
from keypast.wire import SAFETENSORS_TYPE
from tests.service.conftest import until
from tests.service.faults import Stop, soon
from tests.service.living import Guard, House, Sent, Told, code, is_replay
from tests.service.raw_client import RawRequest

MOST = 5  # sessions at a time
Act = Literal["read", "fork", "delete", "cancel", "leave", "queued", "queued leaves", "queued is cancelled"]

picks = st.integers(0, 10**6)
guards: st.SearchStrategy[Guard] = st.sampled_from(get_args(Guard))
seldom = st.integers(0, 3).map(lambda n: n == 0)
stops: st.SearchStrategy[Stop | None] = st.sampled_from([None, None, None, *get_args(Stop)])


class Living(House):
    @precondition(lambda self: len(self.told) < MOST)
    @rule(
        kind=st.integers(0, 1),
        rows=st.sampled_from([1, 1, 1, 2, 3]),
        max_length=st.sampled_from([60, 60, 60, 9, 1]),
        guard=st.sampled_from(["none", "key"]),
        lost=st.booleans(),
    )
    def create(self, kind: int, rows: int, max_length: int, guard: Guard, lost: bool) -> None:
        self.do(self.make(self.voices[kind], rows, max_length, guard, lost))

    @rule(
        number=picks,
        data=st.data(),
        verb=st.sampled_from(["prefill", "prefill", "step", "score"]),
        most=st.sampled_from([1, 6, 21]),
        guard=guards,
        lost=st.booleans(),
        stop=stops,
        skip=st.integers(0, 3),
    )
    def append(
        self,
        number: int,
        data: st.DataObject,
        verb: str,
        most: int,
        guard: Guard,
        lost: bool,
        stop: Stop | None,
        skip: int,
    ) -> None:
        session = self.pick(number)
        rows = self.draw_rows(session, data, most)
        if verb == "step":
            rows = [[row[0] if row else 0] for row in rows]
        sent = self.appending(session, verb, rows)
        if verb != "score":
            self.guarded(sent, guard, self.told[session].version)
        self.do(self.appended(session, verb, rows, sent, lost, stop, skip))

    async def appended(
        self, session: str, verb: str, rows: list[list[int]], sent: Sent, lost: bool, stop: Stop | None, skip: int
    ) -> None:
        told = self.told[session]
        after = told.with_more(rows)
        surely, maybe = await self.room(session, list(map(len, rows)))
        refusal = self.refusal(session, verb, list(map(len, after)))
        if stop is not None:
            fired, reply = await self.failing(session, sent, stop, skip)
            if fired and stop == "encode":
                assert code(reply) == (500, "internal")
                if verb != "score":
                    self.commit(session, after)
                    await self.encoded(told, sent, after, rows)
                return
            if fired:
                assert reply.status_code == 500
                await self.look(as_before=True)
            elif reply.is_success and verb != "score" and not sent.headers:
                self.commit(session, after)
                return
        reply = await (self.send(sent) if verb == "score" or stop is not None else self.once(sent, lost))
        if refusal is not None:
            assert code(reply) == refusal
        elif not reply.is_success:
            assert code(reply) == (429, "pool_exhausted")
            assert not surely
            assert reply.headers["retry-after"]
        else:
            assert maybe
            self.answered(session, reply.json(), after, rows, told.version + (verb != "score"))
            if verb != "score":
                self.commit(session, after)

    async def encoded(self, told: Told, sent: Sent, after: list[list[int]], rows: list[list[int]]) -> None:
        """It was done, though its reply could not be written: who comes again is told so, or that it cannot be told."""
        if not sent.headers:
            return
        again = await self.send(sent)
        if told.voice.speaks:
            assert (again.status_code, is_replay(again)) == (200, True)
            told.voice.check(again.json()["outputs"], after, rows)
        else:
            assert code(again) == (500, "internal")

    @rule(
        number=picks,
        count=st.integers(1, 5),
        guard=guards,
        lost=st.booleans(),
        stream=seldom,
        stop=stops,
        skip=st.integers(0, 4),
    )
    def generate(
        self, number: int, count: int, guard: Guard, lost: bool, stream: bool, stop: Stop | None, skip: int
    ) -> None:
        session = self.pick(number, speaks=True)
        body = {"max_tokens": count, "sample": {"temperature": 0}, "stream": stream}
        sent = Sent("POST", f"/v1/sessions/{session}/generate", body)
        self.guarded(sent, guard, self.told[session].version)
        self.do(self.generated(session, count, sent, lost, stop, skip))

    async def generated(self, session: str, count: int, sent: Sent, lost: bool, stop: Stop | None, skip: int) -> None:
        """Each token is a commit, so one that fails is told as far as it came."""
        told = self.told[session]
        if not all(told.rows):
            assert code(await self.send(sent)) == (409, "wrong_state")
            return
        reply = await (self.once(sent, lost) if stop is None else self.failing_generation(session, sent, stop, skip))
        version = told.version
        await self.follow(session)
        taken = told.version - version
        limit = min(count, max(told.max_length - length for length in told.lengths) + taken)
        assert taken <= count
        if reply.is_success and not sent.body["stream"]:
            body = reply.json()
            assert (body["valid_length"], body["version"]) == (told.lengths, told.version)
            tokens = body["outputs"]["token_ids"]
            assert tokens == [row[len(row) - len(more) :] for row, more in zip(told.rows, tokens, strict=True)]
            assert max(map(len, tokens)) == taken
            assert taken == limit or "cancelled" in body["finish_reason"]
        elif not reply.is_success:
            assert taken == 0, "an error says that nothing was applied"

    async def failing_generation(self, session: str, sent: Sent, stop: Stop, skip: int) -> httpx.Response:
        _, reply = await self.failing(session, sent, stop, skip)
        if reply.is_success and sent.headers:
            version = (await self.client.get(f"/v1/sessions/{session}")).json()["version"]
            again = await self.send(sent)
            if version != self.told[session].version or "idempotency-key" in sent.headers:
                assert is_replay(again)
                assert sent.body["stream"] or again.content == reply.content
        return reply

    async def follow(self, session: str) -> None:
        """A generation that was stopped keeps what it committed: read how far it came, and whether that is right."""
        told = self.told[session]
        info = (await self.client.get(f"/v1/sessions/{session}")).json()
        grew = [length - len(row) for length, row in zip(info["valid_length"], told.rows, strict=True)]
        assert info["version"] - told.version == max(grew)
        assert min(grew) >= 0
        if any(grew):
            past = Past.from_bytes((await self.client.get(f"/v1/sessions/{session}/past")).content)
            for row, ids, more in zip(told.rows, past.arrays["token_ids"].tolist(), grew, strict=True):
                for token in ids[len(row) : len(row) + more]:
                    assert told.voice.next(row, token)
                    row.append(token)
        told.version = info["version"]

    @precondition(lambda self: len(self.told) < MOST)
    @rule(number=picks, count=st.integers(1, 2), at=picks, now=st.booleans(), keyed=st.booleans(), lost=st.booleans())
    def fork(self, number: int, count: int, at: int, now: bool, keyed: bool, lost: bool) -> None:
        session = self.pick(number)
        told = self.told[session]
        length = at % (min(told.lengths) + 1)
        body = {"count": count} if now else {"count": count, "at": length}
        sent = self.guarded(Sent("POST", f"/v1/sessions/{session}/fork", body), "key" if keyed else "none", 0)
        reply = self.do(self.once(sent, lost))
        assert reply.status_code == 201
        self.forked(session, reply, None if now else length)

    def forked(self, session: str, reply: httpx.Response, length: int | None) -> None:
        told = self.told[session]
        for child in reply.json()["sessions"]:
            rows = [row[:length] for row in told.rows]
            self.told[child["id"]] = Told(told.voice, rows, 0, told.max_length, told.ttl)

    @rule(number=picks, at=st.lists(picks, min_size=3, max_size=3), guard=guards, lost=st.booleans())
    def truncate(self, number: int, at: list[int], guard: Guard, lost: bool) -> None:
        session = self.pick(number)
        told = self.told[session]
        lengths = [pick % (length + 1) for pick, length in zip(at, told.lengths, strict=False)]
        sent = Sent("POST", f"/v1/sessions/{session}/truncate", {"length": lengths})
        reply = self.do(self.once(self.guarded(sent, guard, told.version), lost))
        assert (reply.status_code, reply.json()["valid_length"]) == (200, lengths)
        self.commit(session, [row[:length] for row, length in zip(told.rows, lengths, strict=True)])

    @rule(number=picks, ttl=st.sampled_from([None, 50.0]), pinned=st.booleans(), expects=st.booleans())
    def change(self, number: int, ttl: float | None, pinned: bool, expects: bool) -> None:
        session = self.pick(number)
        told = self.told[session]
        body = {"ttl_seconds": ttl, "pinned": pinned, "labels": {"a": "b"}}
        sent = self.guarded(
            Sent("PATCH", f"/v1/sessions/{session}", body), "version" if expects else "none", told.version
        )
        told.ttl, told.pinned = ttl, pinned
        for _ in range(2):
            reply = self.do(self.send(sent))
            assert (reply.status_code, reply.json()["ttl_seconds"], reply.json()["pinned"]) == (200, ttl, pinned)

    @rule()
    def time_passes(self) -> None:
        self.clock.now += 60
        for session in [session for session, told in self.told.items() if told.ttl is not None and not told.pinned]:
            del self.told[session]
            self.gone[session] = "expired"

    @rule(number=picks, guard=guards)
    def delete(self, number: int, guard: Guard) -> None:
        session = self.pick(number)
        told = self.told.pop(session)
        self.gone[session] = "deleted"
        sent = self.guarded(Sent("DELETE", f"/v1/sessions/{session}"), guard, told.version)
        if guard == "version":
            reply = self.do(self.send(sent))
            assert code(self.do(self.send(sent))) == (410, "session_gone")
        else:
            reply = self.do(self.once(sent))
        assert (reply.status_code, reply.json()["positions"]) == (200, sum(told.lengths))

    @rule(
        number=picks,
        data=st.data(),
        verb=st.sampled_from(
            ["step", "prefill", "score", "generate", "truncate", "fork", "", "past", "DELETE", "PATCH"]
        ),
        off=st.sampled_from([-2, -1, 1, 7]),
    )
    def stale(self, number: int, data: st.DataObject, verb: str, off: int) -> None:
        """Who expects another version changes nothing, whatever is asked."""
        session = self.pick(number, speaks=verb == "generate")
        told = self.told[session]
        path = f"/v1/sessions/{session}"
        others: dict[str, Sent] = {
            "generate": Sent("POST", f"{path}/generate", {"max_tokens": 3}),
            "truncate": Sent("POST", f"{path}/truncate", {"length": 0}),
            "fork": Sent("POST", f"{path}/fork", {"count": 2}),
            "": Sent("GET", path),
            "past": Sent("GET", f"{path}/past"),
            "DELETE": Sent("DELETE", path),
            "PATCH": Sent("PATCH", path, {"pinned": True}),
        }
        sent = others.get(verb) or self.appending(session, verb, [[3]] * len(told.rows))
        if sent.body is not None:
            self.keys += 1
            sent.body = json.dumps(sent.body).encode() + b" " * self.keys  # nobody has asked for this before
        sent.headers["if-match"] = f'"{max(told.version + off, int(told.version == 0))}"'
        reply = self.do(self.send(sent))
        assert code(reply) == (412, "moved")
        assert (reply.json()["version"], reply.json()["valid_length"]) == (told.version, told.lengths)

    @rule(numbers=st.lists(picks, min_size=1, max_size=3), data=st.data(), failing=seldom, keyed=st.booleans())
    def batch(self, numbers: list[int], data: st.DataObject, failing: bool, keyed: bool) -> None:
        """One step of each, one of which may fail; it comes again, and only that one is done."""
        sessions = list(dict.fromkeys(self.pick(number) for number in numbers))
        rows = {session: [row[:1] for row in self.draw_rows(session, data, 1)] for session in sessions}
        for session in sessions:
            rows[session] = [row or [2] for row in rows[session]]
        self.do(self.stepped(rows, sessions[0] if failing else None, keyed))

    async def stepped(self, rows: dict[str, list[list[int]]], failing: str | None, keyed: bool) -> None:
        items = [{"session_id": session, **self.appending(session, "step", new).body} for session, new in rows.items()]
        sent = self.guarded(Sent("POST", "/v1/batch/step", {"items": items}), "key" if keyed else "none", 0)
        allowed: dict[str, set[tuple[int, str]]] = {}
        for session, new in rows.items():
            lengths = list(map(len, self.told[session].with_more(new)))
            refusal = self.refusal(session, "step", lengths)
            allowed[session] = {refusal} if refusal else {(200, ""), (429, "pool_exhausted")}
        if failing is not None:
            self.told[failing].voice.runner.fail("forward", failing)
        done: set[str] = set()
        for _ in range(1 + keyed):
            outcomes = (await self.send(sent)).json()["items"]
            for (session, new), outcome in zip(rows.items(), outcomes, strict=True):
                told = self.told[session]
                ended = outcome["status"], outcome.get("problem", {}).get("code", "")
                assert outcome["replayed"] == (session in done)
                if session in done:
                    continue
                if ended == (500, "model_failed"):
                    assert session == failing
                    continue
                assert ended in allowed[session]
                if ended[0] == 200:
                    after = told.with_more(new)
                    self.answered(session, outcome["reply"], after, new, told.version + 1)
                    self.commit(session, after)
                    done.add(session)
            if failing is not None:
                self.told[failing].voice.runner.mend()

    @precondition(lambda self: len(self.told) < MOST)
    @rule(number=picks, guard=guards, lost=st.booleans(), stop=st.sampled_from([None, None, "prepare", "forward"]))
    def transfer(self, number: int, guard: Guard, lost: bool, stop: Stop | None) -> None:
        """Out of one session and into a new one."""
        self.do(self.transferred(self.pick(number), guard, lost, stop))

    async def transferred(self, session: str, guard: Guard, lost: bool, stop: Stop | None) -> None:
        told = self.told[session]
        out = Sent("GET", f"/v1/sessions/{session}/past")
        if stop is not None:
            assert code((await self.failing(session, out, stop, 0))[1]) == (500, "model_failed")
        file = await self.send(out)
        assert (file.status_code, file.headers["etag"]) == (200, f'"{told.version}"')
        copy = await self.make(told.voice, len(told.rows), 60, "none", False)
        into = Sent("PUT", f"/v1/sessions/{copy}/past", file.content)
        self.guarded(into, guard, 0).headers["content-type"] = SAFETENSORS_TYPE
        surely, _ = await self.room(copy, told.lengths)
        if stop is not None and surely:
            assert code((await self.failing(copy, into, stop, 0))[1]) == (500, "model_failed")
        if guard == "none":
            reply = await self.send(into)
        else:
            reply = await self.once(into, lost)
        if reply.is_success:
            self.told[copy].rows, self.told[copy].version = [list(row) for row in told.rows], 1
        else:
            assert (code(reply), surely) == ((429, "pool_exhausted"), False)

    @precondition(lambda self: len(self.told) < MOST)
    @rule(number=picks, data=st.data(), act=st.sampled_from(get_args(Act)), fails=seldom)
    def while_it_runs(self, number: int, data: st.DataObject, act: Act, fails: bool) -> None:
        session = self.pick(number)
        first, second = self.draw_rows(session, data, 6), self.draw_rows(session, data, 6)
        self.do(self.met(session, act, first, second, fails and not act.startswith("queued")))

    async def met(self, session: str, act: Act, rows: list[list[int]], more: list[list[int]], fails: bool) -> None:
        """Something comes while a first append is held in its forward pass, which may fail then."""
        told = self.told[session]
        runner = told.voice.runner
        sent = self.guarded(self.appending(session, "prefill", rows), "key", 0)
        after = Told(told.voice, told.with_more(rows), told.version + 1, told.max_length)
        second = self.guarded(self.appending(session, "prefill", more, after), "key", 0)
        runner.hold()
        if fails:
            runner.fail("prepare", session)
        leaver = RawRequest(self.app, sent.path, sent.body, sent.headers) if act == "leave" else None
        task: asyncio.Task[Any] = leaver.task if leaver else asyncio.create_task(self.send(sent))
        try:
            if not await soon(runner.held, task):
                runner.mend()
                await task
                assert (await self.send(sent)).status_code in (422, 429)
                return
            await self.act(session, act, task, second)
            if leaver is not None:
                leaver.leave()
        finally:
            runner.release()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: self.engine.idle)
        runner.mend()
        if act == "delete":
            assert code(task.result()) == (410, "session_gone")
            return
        if fails:
            await self.look()
        again = await self.send(sent)
        if fails and again.status_code == 429:  # a fork has since taken a share of what it needs
            return
        assert (again.status_code, is_replay(again)) == (200, not fails), "what ran has committed"
        self.answered(session, again.json(), after.rows, rows, after.version)
        self.commit(session, after.rows)
        if act.startswith("queued"):
            reply = await self.send(second)
            if reply.is_success:
                assert is_replay(reply) == (act != "queued leaves"), "only who leaves takes along what has not begun"
                ended = told.with_more(more)
                self.answered(session, reply.json(), ended, more, told.version + 1)
                self.commit(session, ended)

    async def act(self, session: str, act: Act, running: asyncio.Task[Any], second: Sent) -> None:
        told, path = self.told[session], f"/v1/sessions/{session}"
        if act == "read":
            info = (await self.client.get(path)).json()
            assert (info["state"], info["valid_length"], info["version"]) == ("running", told.lengths, told.version)
        elif act == "fork":
            self.forked(session, await self.send(Sent("POST", f"{path}/fork", {})), None)
        elif act == "delete":
            assert (await self.send(Sent("DELETE", path))).json()["positions"] == sum(told.lengths)
            del self.told[session]
            self.gone[session] = "deleted"
        elif act == "cancel":
            running.cancel()
        elif act.startswith("queued"):
            leaver = RawRequest(self.app, second.path, second.body, second.headers)
            await until(lambda: self.engine.capacity().waiting == 2)
            if act == "queued leaves":
                leaver.leave()
                await leaver.task
            elif act == "queued is cancelled":
                leaver.task.cancel()
                await asyncio.gather(leaver.task, return_exceptions=True)


TestFew = Living.TestCase
TestFew.settings = settings(max_examples=6, stateful_step_count=25, deadline=None, report_multiple_bugs=False)


class Many(Living):
    """The same, for longer."""


TestMany = pytest.mark.slow(Many.TestCase)
TestMany.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, report_multiple_bugs=False)
