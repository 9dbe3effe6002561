"""A run against a server whose latencies are known, in virtual time: what is measured is what they are."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keypast.loadtest.record import Record
from tests.loadtest.fake_server import Answer, Answering, Asked, always, event
from tests.loadtest.loads import counted, plan
from tests.loadtest.virtual import Loaded

OPEN = {"rate": {"begin": 100, "end": 100}, "gaps": "fixed"}
CHAT = {"kind": "chat", "turns": 2, "prompt": 5, "output": 4}


def close(ms: float) -> Any:
    """As near as three digits are."""
    return pytest.approx(ms, rel=1e-3)


@settings(max_examples=8)
@given(st.floats(1e-4, 10), st.integers(1, 8))
def test_a_known_latency_is_measured(seconds: float, users: int) -> None:
    found = Loaded(plan(arrival={"concurrency": users}, seconds=20 * seconds), always(Answer(), seconds))
    assert [found.ms("request", at) for at in ("p50", "p99.9", "mean", "max")] == [close(1e3 * seconds)] * 4
    assert found.record.window["operations"] == pytest.approx(20 * users, abs=users)
    assert found.together == users


def stalls(at: float, seconds: float) -> Answering:
    """Answers after 5 ms; but what comes in the `seconds` after so many of the first request waits until their end."""
    began: list[float] = []

    async def answer(asked: Asked) -> Answer:
        began.append(asked.arrived)
        inside = asked.arrived - began[0] - at
        await asyncio.sleep(max(0.005, seconds - inside if 0 <= inside < seconds else 0.0))
        return Answer()

    return answer


def test_a_stall_shows_in_p99_of_an_open_loop() -> None:
    """100 ms of 2 s: of 200 visits ten are due meanwhile, and wait 100, 90 .. 10 ms. p99 is the third worst."""
    found = Loaded(plan(arrival=OPEN, seconds=2), stalls(0.7, 0.1))
    assert found.count("request") == 200
    assert [found.ms("request", at) for at in ("p50", "p95", "p99", "max")] == [
        close(5),
        close(5),
        close(80),
        close(100),
    ]


def test_a_closed_loop_sees_the_same_stall_once() -> None:
    found = Loaded(plan(seconds=2), stalls(0.7025, 0.1))
    assert [found.ms("request", at) for at in ("p99", "max")] == [close(5), close(97.5)]


def test_what_waits_for_a_connection_waits_since_it_was_due() -> None:
    """One connection of 30 ms a request; of the 50 that are due in half a second the last one ends after 1.5."""
    found = Loaded(plan(arrival=OPEN, connections=1, seconds=0.5), always(Answer(), 0.03))
    assert found.count("request") == 50
    assert found.ms("request", "max") == close(1500 - 490)
    assert found.ms("late", "max") == close(1470 - 490)
    assert found.record.window["operations"] == 16  # in the half second itself


def chat_chunk(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


def reply(*gaps: float, words: str = "abcd") -> Answer:
    usage = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6}})
    head = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    parts = [(gap, chat_chunk(word)) for gap, word in zip(gaps, words, strict=True)]
    return Answer(parts=((0, head), *parts, (0, usage), (0, event(b"[DONE]"))))


def test_a_streams_first_token_and_its_gaps() -> None:
    found = Loaded(counted(3, CHAT), always(reply(0.05, 0.01, 0.01, 0.04)))
    assert (found.count("turn"), found.count("ttft"), found.count("inter_token")) == (6, 6, 18)
    assert (found.ms("ttft", "p50"), found.ms("turn", "p50")) == (close(50), close(110))
    assert [found.ms("inter_token", at) for at in ("p50", "mean", "max")] == [close(10), close(20), close(40)]
    assert found.record.window["output_tokens"] == 6 * 6  # as the usage has it, more than there were chunks
    assert found.record.window["prompt_tokens"] == 9 * 6
    first, second = (body["messages"] for body in found.bodies[:2])
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert (second[0], second[1]["content"]) == (first[0], "abcd")


def test_a_thought_between_turns_is_no_latency() -> None:
    found = Loaded(counted(1, {**CHAT, "think": 0.2}), always(reply(0.01, 0, 0, 0)))
    first, second = found.asked
    assert second.arrived - first.arrived == pytest.approx(0.21)
    assert found.ms("turn", "max") == close(10)


def test_the_warm_up_and_what_is_due_after_the_end_are_left_out() -> None:
    async def answer(asked: Asked) -> Answer:
        await asyncio.sleep(0.5 if asked.arrived < 1002 else 0.01)
        return Answer()

    found = Loaded(plan(seconds=4, warmup=2.1), answer)
    assert found.ms("request", "max") == close(10)
    assert found.count("request") == found.record.window["operations"] == 190
    assert found.seconds == pytest.approx(4, abs=0.011)


def test_a_visit_that_the_end_cuts_off_has_failed_in_nothing() -> None:
    found = Loaded(plan(visit={**CHAT, "turns": 50, "think": 1}, seconds=10), always(reply(0.5, 0, 0, 0)))
    assert (found.record.window["cut"], found.record.window["failed"]) == (1, 0)
    assert (found.record.errors, found.count("turn")) == ({}, 7)
    assert found.seconds < 11


ENDINGS = {
    "queue_full": Answer(429, json.dumps({"code": "queue_full", "error": {"code": "other"}}).encode()),
    "rate_limit_exceeded": Answer(429, json.dumps({"error": {"code": "rate_limit_exceeded"}}).encode()),
    "http_503": Answer(503, b"<html>busy</html>"),
    "http_404": Answer(404, json.dumps({"error": {"code": 404, "message": "a number"}}).encode()),
    "http_302": Answer(302, b""),
    "broken": Answer(drop=True),
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_errors_by_class(kind: str) -> None:
    found = Loaded(counted(3), always(ENDINGS[kind]))
    assert found.record.errors == {f"request {kind}": 3}
    assert (found.record.window["failed"], found.record.window["ended"]) == (3, 0)
    assert found.record.totals == {}


def test_a_reply_that_does_not_come_is_a_timeout() -> None:
    found = Loaded(counted(2, timeout=7), always(Answer(), 1000))
    assert found.record.errors == {"request timeout": 2}
    assert found.seconds == pytest.approx(2 * 7 + 2 * 0.1)


STREAMS = {
    "turn in_stream": event({"error": {"message": "no"}}),
    "turn model_failed": event({"error": {"message": "no", "code": "model_failed"}}),
    "turn broken": chat_chunk("a"),
    "turn protocol": event(b"{"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_what_goes_wrong_inside_a_stream(kind: str) -> None:
    found = Loaded(counted(1, CHAT), always(Answer(parts=((0, STREAMS[kind]),))))
    assert found.record.errors == {kind: 1}


@pytest.mark.parametrize(("headers", "pause"), [({}, 0.1), ({"Retry-After": "1"}, 1), ({"Retry-After": "60"}, 2)])
def test_after_a_failure_a_user_of_a_closed_loop_waits(headers: dict[str, str], pause: float) -> None:
    found = Loaded(plan(seconds=10 * pause - 0.01), always(Answer(503, headers=headers)))
    assert len(found.asked) == 10


def shares(workers: int, arrival: dict[str, Any]) -> list[bytes]:
    bodies: list[bytes] = []
    for worker in range(workers):
        asked = counted(12, {**CHAT, "prompt": {"high": 9}}, workers=workers, worker=worker, seed=5, arrival=arrival)
        bodies += [each.body for each in Loaded(asked, always(reply(0, 0, 0, 0))).asked]
    return sorted(bodies)


def test_the_same_seed_is_the_same_visits_whatever_the_workers() -> None:
    rate = {"rate": {"begin": 500, "end": 500}}
    one = shares(1, {"concurrency": 1})
    assert len(set(one)) == 24
    assert one == shares(3, {"concurrency": 5}) == shares(2, rate)


@pytest.mark.parametrize("honest", [True, False])
def test_outputs_that_depend_on_the_load_are_found(honest: bool) -> None:
    async def answer(asked: Asked) -> Answer:
        return Answer(body=b"the same" if honest or asked.number < 12 else b"another")

    found = Loaded(counted(12, arrival={"concurrency": 4}, check=6), answer)
    assert len(found.asked) == 12 + 6
    assert found.checked is not None
    assert (found.checked.equal, found.checked.different) == ((6, 0) if honest else (0, 6))
    assert (found.checked.first is None) == honest
    assert found.count("request") == 12


def test_goodput_counts_what_was_within_the_slo() -> None:
    async def answer(asked: Asked) -> Answer:
        await asyncio.sleep(0.06 if asked.number % 4 == 0 else 0.01)
        return Answer()

    slo = {"objectives": [{"measure": "request", "limit": 40}]}
    found = Loaded(counted(20, slo=slo), answer)
    assert (found.record.window["operations"], found.record.window["good"]) == (20, 15)


def test_records_add_up_and_intervals_are_those_of_the_run() -> None:
    both = Record()
    for worker in (0, 1):
        found = Loaded(plan(arrival=OPEN, seconds=2, workers=2, worker=worker), always(Answer(), 0.001))
        for snapshots in found.record.series.values():
            for snapshot in snapshots:
                both.add(snapshot)
    assert both.totals["request"].get_total_count() == both.window["operations"] == 200
    ended = {at: sum(each.counts.get("operations", 0) for each in told) for at, told in both.series.items()}
    assert [ended[at] for at in range(8)] == [25] * 8
