"""The retry trap: the service commits, its reply is lost, the client sends the request again. Nothing is done twice."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from keypast import AppendResult, AsyncClient, Client, Retries, Session
from tests.e2e.losing_proxy import LosingProxy
from tests.e2e.test_server import FAKES, Server
from tests.pace import slow_but
from tests.service.fakes import KINDS, Kind

DECODER = KINDS["decoder"]
STEP = 0.15  # seconds a batch takes


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with Server(FAKES, str(STEP)) as server:
        yield server.address()


@pytest.fixture
def proxy(service: str) -> Iterator[LosingProxy]:
    with LosingProxy(service) as proxy:
        yield proxy


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def told(reply: bytes) -> dict[str, Any]:
    """What a lost reply said."""
    said: dict[str, Any] = json.loads(reply.partition(b"\r\n\r\n")[2])
    return said


def inputs(kind: Kind, n: int, past: int) -> Any:
    """Keywords of a prefill or a step."""
    return kind.inputs(n, past, 1, False)


@pytest.mark.parametrize("keep", slow_but([0, 20, 400], {400}))
def test_the_client_is_never_caught(service: str, proxy: LosingProxy, kind: Kind, keep: int) -> None:
    """Every reply is lost once, whole, in its head or in its body."""
    proxy.keep = keep
    with Client(proxy.address, binary=False) as client, Client(service) as witness:
        before = witness.capacity().sessions

        def lose(action: Callable[[], Any]) -> Any:
            proxy.lose, proxy.lost = 1, []
            result = action()
            assert len(proxy.lost) == 1
            return result

        session: Session = lose(lambda: client.sessions.create(kind.model))
        assert witness.capacity().sessions == before + 1
        seen = witness.sessions.get(session.id)
        prefilled = lose(lambda: session.prefill(**inputs(kind, 3, 0)))
        assert (prefilled.replayed, prefilled.version, seen.refresh().valid_length) == (True, 1, [3])
        stepped = lose(lambda: session.step(**inputs(kind, 1, 3), expect_version=True))
        assert (stepped.replayed, stepped.version, seen.refresh().valid_length) == (True, 2, [4])
        assert told(proxy.lost[0])["version"] == 2, "the reply that was lost told of the same commit"
        child = lose(lambda: session.fork(at=2))
        assert witness.capacity().sessions == before + 2
        lose(lambda: session.truncate(1))
        assert (seen.refresh().version, seen.valid_length) == (3, [1])
        assert lose(child.delete).positions == 2
        assert lose(session.delete).positions == 1
        assert witness.capacity().sessions == before


def test_a_generation_is_never_run_twice(service: str, proxy: LosingProxy) -> None:
    with Client(proxy.address) as client, Client(service) as witness:
        session = client.sessions.create(DECODER.model)
        session.prefill(text="a")
        proxy.lose = 2
        generated = session.generate(max_tokens=2)
        assert (generated.replayed, generated.outputs.text, generated.version) == (True, ["bc"], 3)
        assert witness.sessions.get(session.id).valid_length == [3]


def test_a_batch_of_steps_is_never_run_twice(service: str, proxy: LosingProxy) -> None:
    with Client(proxy.address) as client:
        sessions = [client.sessions.create(kind.model) for kind in KINDS.values()]
        for session, kind in zip(sessions, KINDS.values(), strict=True):
            session.prefill(**inputs(kind, 3, 0))
        proxy.lose = 2
        steps = [(session, inputs(kind, 1, 3)) for session, kind in zip(sessions, KINDS.values(), strict=True)]
        results = client.batch_step(steps)
        assert [(result.replayed, result.version) for result in results if isinstance(result, AppendResult)] == [
            (True, 2)
        ] * 2
        assert [session.refresh().valid_length for session in sessions] == [[4], [4]]


@pytest.mark.anyio
async def test_the_async_client_is_never_caught(service: str, proxy: LosingProxy, kind: Kind) -> None:
    async with AsyncClient(proxy.address) as client:
        session = await client.sessions.create(kind.model)
        proxy.lose = 2
        prefilled = await session.prefill(**inputs(kind, 3, 0))
        assert (prefilled.replayed, prefilled.version, prefilled.valid_length) == (True, 1, [3])
        assert (await session.refresh()).version == 1


def test_who_does_not_wait_for_the_reply_gets_it_all_the_same(service: str, kind: Kind) -> None:
    """Each try is given up before the model is done; those that follow wait for the first."""
    hurried = Client(service, timeout=STEP * 0.6, retries=Retries(limit=20))
    with hurried as client, Client(service) as witness:
        session = client.sessions.create(kind.model)
        prefilled = session.prefill(**inputs(kind, 3, 0))
        assert (prefilled.version, prefilled.valid_length) == (1, [3])
        assert witness.sessions.get(session.id).valid_length == [3]


@pytest.mark.parametrize("headers", [{"idempotency-key": "k"}, {"if-match": '"1"'}], ids=["key", "version"])
def test_any_client_that_sends_the_same_again(
    service: str, proxy: LosingProxy, kind: Kind, headers: dict[str, str]
) -> None:
    """Without this library: with a key, or with the version that it expects."""
    with httpx.Client(base_url=service, timeout=30) as direct:
        path = direct.post("/v1/sessions", json={"model": kind.model}).headers["location"]
        assert direct.post(f"{path}/prefill", json=kind.json(3)).status_code == 200
        proxy.lose = 2
        for _ in range(2):
            with pytest.raises(httpx.TransportError):
                httpx.post(f"{proxy.address}{path}/step", json=kind.json(1, 3), headers=headers, timeout=30)
        reply = httpx.post(f"{proxy.address}{path}/step", json=kind.json(1, 3), headers=headers, timeout=30)
        assert (reply.status_code, reply.headers["idempotent-replayed"]) == (200, "true")
        assert reply.json() == told(proxy.lost[0])
        state = direct.get(path).json()
        assert (state["version"], state["valid_length"]) == (2, [4])
        moved = direct.post(f"{path}/prefill", json=kind.json(2, 4), headers={"if-match": '"1"'})
        assert moved.status_code == 412, "another body is another request"
