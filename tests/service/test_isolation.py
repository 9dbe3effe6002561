"""Canaries: what one tenant puts into the pool changes no bit of what another is told, whatever becomes of it there.

The whole service over real models of both kinds. Tenant A meddles before everything that B does, in blocks that B gets
next, and all that A holds is NaN; B's replies are those of a service that A was never in. Where the two share a batch,
A's numbers are exchanged.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engine.attention.base import Backend
from engine.batch import Array, Batch, RowResult
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models import build
from engine.models.base import LoadOptions, Model
from engine.runner import ModelRunner
from keypast.wire import SAFETENSORS_TYPE, dump_tensors, encode_options, load_tensors
from service.app import create_app
from service.lifecycle import Loaded
from service.settings import Settings
from tests.engine.models import CACHE, backend
from tests.fakes import FakeClock
from tests.service.conftest import until
from tests.service.tenants import KEYS, as_tenant
from tests.tiny import save_tiny_decoder

pytestmark = pytest.mark.anyio

BLOCKS, BLOCK_SIZE = 24, 16
WIDTH = 24
Inputs = dict[str, Array]


def words(n: int, past: int, canary: float) -> Inputs:
    ids = np.random.default_rng([n, past]).integers(0, 250, (1, n))
    return {"token_ids": (ids + int(canary)) % 250}


def tensors(n: int, past: int, canary: float) -> Inputs:
    random = np.random.default_rng([n, past])
    inputs: Inputs = {}
    for name in ("query", "key", "value"):
        inputs[name] = random.normal(loc=canary, size=(1, n, WIDTH)).astype(np.float32)
    return {**inputs, "attention_mask": np.tri(n, past + n, past, dtype=np.uint8)[None]}


INPUTS: dict[str, Callable[[int, int, float], Inputs]] = {"decoder": words, "attention": tensors}


@cache
def model_of(kind: str, path: Path) -> Model:
    spec = str(save_tiny_decoder(path)) if kind == "decoder" else f"attention:hidden={WIDTH},heads=3"
    return build("model", spec, LoadOptions(CACHE, dtype="float32"), print).model


class Runner(ModelRunner):
    """Knows whose rows wrote to which blocks. `gate` holds every batch while it is closed. A's batches fail if it is so
    said, and what they wrote to is NaN after each, if it is `soiled`."""

    def __init__(self, model: Model, kernels: Backend) -> None:
        super().__init__(model, kernels, BLOCKS + 1, BLOCK_SIZE)
        self.written: defaultdict[str, set[int]] = defaultdict(set)
        self.shared_batches = 0
        self.a_fails = False
        self.soiled = True
        self.entered, self.gate = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.gate.set()

    def run(self, batch: Batch) -> list[RowResult]:
        self._loop.call_soon_threadsafe(self.entered.set)
        asyncio.run_coroutine_threadsafe(self.gate.wait(), self._loop).result(20)
        tenants = {row.work.session.tenant for row in batch.rows}
        self.shared_batches += len(tenants & {"a", "b"}) == 2
        for row in batch.rows:
            written = row.table[row.start // BLOCK_SIZE : (row.stop - 1) // BLOCK_SIZE + 1]
            self.written[row.work.session.tenant] |= set(written)
        results = super().run(batch)
        for row in batch.rows:
            if row.work.session.tenant == "a" and self.soiled:
                self._soil(list(row.table), row.stop)
        if "a" in tenants and self.a_fails:
            raise RuntimeError("after all of it was written")
        return results

    def _soil(self, table: list[int], length: int) -> None:
        tensors = self.spec.past_tensors(1, length).items()
        soil = {name: np.full(shape, np.nan, dtype) for name, (dtype, shape) in tensors if "past" in name}
        self.write_past([table], [length], soil)

    def bits(self, block: int) -> Array:
        """All that a block holds."""
        past = self.read_past([[block]], [BLOCK_SIZE])
        return np.concatenate([array.view(np.uint8).ravel() for array in past.values()])


@dataclass
class House:
    """The service, and both tenants' ways to it."""

    http: httpx.AsyncClient
    engine: Engine
    runner: Runner
    clock: FakeClock
    kind: str
    open_by_a: list[str] = field(default_factory=list)

    async def call(self, tenant: str, method: str, path: str, **body: Any) -> httpx.Response:
        return await self.http.request(method, f"/v1/sessions{path}", json=body, headers=as_tenant(tenant))

    async def open(self, tenant: str, **options: Any) -> str:
        reply = await self.call(tenant, "POST", "", model="model", **options)
        assert reply.status_code == 201, reply.text
        return f"/{reply.json()['id']}"

    async def append(
        self, tenant: str, path: str, verb: str, n: int, past: int, *, canary: float = 0, **options: Any
    ) -> httpx.Response:
        content = dump_tensors(INPUTS[self.kind](n, past, canary), {})
        headers = {**as_tenant(tenant), "content-type": SAFETENSORS_TYPE, "accept": SAFETENSORS_TYPE}
        url = f"/v1/sessions{path}/{verb}"
        return await self.http.post(url, content=content, headers=headers, params=encode_options(options))

    async def a_fills(self, positions: int = 40, **options: Any) -> str:
        """One of A's sessions."""
        path = await self.open("a", **options)
        reply = await self.append("a", path, "prefill", positions, 0)
        assert reply.status_code == 200, reply.text
        self.open_by_a.append(path)
        return path

    async def a_leaves(self) -> None:
        for path in self.open_by_a:
            await self.call("a", "DELETE", path)
        self.open_by_a.clear()


@asynccontextmanager
async def opened(kind: str, backend_name: str, path: Path, **config: Any) -> AsyncIterator[House]:
    runner, clock = Runner(model_of(kind, path), backend(backend_name)), FakeClock()
    settings = EngineConfig(**{"block_size": BLOCK_SIZE, "token_budget": 64, **config})
    engine = Engine([runner], settings, clock)
    app = create_app(lambda progress: Loaded(engine, {}), Settings(drain_seconds=1.0, keys=KEYS))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://k")
    async with app.router.lifespan_context(app), client:
        await app.state.service.loaded()
        yield House(client, engine, runner, clock, kind)
        runner.gate.set()
        engine.check()


Meddling = Callable[[House], Awaitable[None]]
Bits = list[dict[str, bytes]]


async def nothing(house: House) -> None:
    pass


async def reuse(house: House) -> None:
    """A had every block that was free."""
    while house.engine.capacity().models[0].free >= 3:
        await house.a_fills()
    await house.a_leaves()


async def abort(house: House) -> None:
    """A's append is deleted while its first chunk is on the device, and chunks are still to come."""
    path = await house.open("a")
    house.runner.gate.clear()
    house.runner.entered.clear()
    append = asyncio.create_task(house.append("a", path, "prefill", 100, 0))
    await house.runner.entered.wait()
    await house.call("a", "DELETE", path)
    house.runner.gate.set()
    assert (await append).status_code == 410


async def fork(house: House) -> None:
    """A's children write to copies of a block that they share, and go; their parent goes after them."""
    path = await house.a_fills()
    reply = await house.call("a", "POST", f"{path}/fork", count=2, at=21)
    for child in reply.json()["sessions"]:
        await house.append("a", f"/{child['id']}", "prefill", 20, 21)
        await house.call("a", "DELETE", f"/{child['id']}")
    await house.a_leaves()


async def truncate(house: House) -> None:
    """A keeps a part of a block, and gives back the others; it stays where it is until B has gone on."""
    await house.a_leaves()
    path = await house.a_fills(56)
    await house.call("a", "POST", f"{path}/truncate", length=5)


async def evict(house: House) -> None:
    """No block is free, so B gets its own by A's loss."""
    while house.engine.capacity().models[0].free:
        await house.a_fills(16)


async def expire(house: House) -> None:
    await house.a_fills(56, ttl_seconds=10)
    house.open_by_a.clear()
    house.clock.now += 11


async def fail(house: House) -> None:
    """A's append is rolled back after all of it was written."""
    path = await house.open("a")
    house.runner.a_fails = True
    reply = await house.append("a", path, "prefill", 60, 0)
    house.runner.a_fails = False
    assert reply.status_code == 500


async def score(house: House) -> None:
    reply = await house.append("a", await house.open("a"), "score", 60, 0)
    assert reply.status_code == 200


MEDDLINGS = [reuse, abort, fork, truncate, evict, expire, fail, score]


async def told(house: House, meddle: Meddling) -> Bits:
    """Every output that B is given in its life, which goes over blocks' ends, forks and comes back."""
    bits: Bits = []
    wants: dict[str, Any] = {"logits": "all"} if house.kind == "decoder" else {}

    async def asks(path: str, verb: str, n: int, past: int) -> None:
        await meddle(house)
        reply = await house.append("b", path, verb, n, past, **wants)
        assert reply.status_code == 200, reply.text
        arrays, metadata = load_tensors(reply.content, finite=False)
        assert metadata["past_length"] == f"[{past}]"
        bits.append({name: array.tobytes() for name, array in arrays.items()})
        assert all(np.isfinite(array).all() for array in arrays.values())

    path = await house.open("b", pinned=True)
    await asks(path, "prefill", 37, 0)
    await asks(path, "step", 1, 37)
    await meddle(house)
    reply = await house.call("b", "POST", f"{path}/fork", at=20)
    child = f"/{reply.json()['sessions'][0]['id']}"
    await house.call("b", "PATCH", child, pinned=True)
    await asks(child, "step", 1, 20)
    await asks(child, "prefill", 30, 21)
    await asks(path, "score", 20, 38)
    await meddle(house)
    await house.call("b", "POST", f"{path}/truncate", length=19)
    await asks(path, "prefill", 35, 19)
    await house.call("b", "DELETE", child)
    await asks(path, "step", 1, 54)
    if house.kind == "decoder":
        await meddle(house)
        generated = await house.call("b", "POST", f"{path}/generate", max_tokens=20, logprobs=True)
        bits.append({"generated": generated.text[: generated.text.index('"timings"')].encode()})
    return bits


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Bits]:
    """What B is told when A is not there, as soon as a test has found it out."""
    return {}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.mark.parametrize("meddle", MEDDLINGS, ids=[meddle.__name__ for meddle in MEDDLINGS])
@pytest.mark.parametrize(
    ("backend_name", "zero"),
    [pytest.param("sdpa", False, marks=pytest.mark.slow), ("cpu", False), ("cpu", True)],
    ids=["sdpa-stale", "stale", "zeroed"],
)
@pytest.mark.parametrize("kind", INPUTS)
async def test_what_a_had_in_bs_blocks_changes_no_bit(
    path: Path, alone: dict[tuple[str, str], Bits], kind: str, backend_name: str, meddle: Meddling, zero: bool
) -> None:
    if (kind, backend_name) not in alone:
        async with opened(kind, backend_name, path) as house:
            alone[kind, backend_name] = await told(house, nothing)
    async with opened(kind, backend_name, path, zero_freed=zero, evict="lru") as house:
        assert await told(house, meddle) == alone[kind, backend_name]
        assert house.runner.written["a"] & house.runner.written["b"], "B got blocks that A had"
        await house.a_leaves()
    _look_at_what_is_left(house, zero)


def _look_at_what_is_left(house: House, zero: bool) -> None:
    """With zeroing on nothing is left of A; without, there was something to be seen."""
    while house.engine.run_once():
        pass
    pool = house.engine.capacity().models[0]
    touched = house.runner.written["a"] | house.runner.written["b"]
    assert (sum(house.runner.bits(block).any() for block in touched) == pool.used) == zero
    was_as = [house.runner.read_past([[block]], [BLOCK_SIZE]) for block in house.runner.written["a"]]
    assert all(np.isfinite(array).all() for past in was_as for array in past.values()) == zero


@pytest.mark.parametrize("backend_name", ["sdpa", "cpu"])
@pytest.mark.parametrize("kind", INPUTS)
async def test_what_a_has_in_bs_batches_changes_no_bit(path: Path, kind: str, backend_name: str) -> None:
    """The same requests at the same time, A's of other numbers: every batch has the same rows, of both."""
    seen = []
    for canary in (0.0, 3.0, 40.0):
        async with opened(kind, backend_name, path, token_budget=24) as house:
            house.runner.soiled = False
            seen.append(await _side_by_side(house, canary))
            assert house.runner.shared_batches >= 3
    assert seen[0] == seen[1] == seen[2]


async def _side_by_side(house: House, canary: float) -> list[bytes]:
    ours, theirs, third = [await house.open(tenant) for tenant in ("b", "a", "c")]
    bits = []
    past, past_of_a = 0, 0
    for n, n_of_a in ((10, 13), (1, 9), (12, 1), (1, 1)):
        house.runner.gate.clear()
        house.runner.entered.clear()
        requests = [asyncio.create_task(house.append("c", third, "score", 1, 0))]
        await house.runner.entered.wait()  # what comes while this runs is in one batch
        requests.append(asyncio.create_task(house.append("b", ours, "prefill", n, past)))
        await until(lambda: house.engine.capacity().waiting == 2)
        append = house.append("a", theirs, "prefill", n_of_a, past_of_a, canary=canary)
        requests.append(asyncio.create_task(append))
        await until(lambda: house.engine.capacity().waiting == 3)
        house.runner.gate.set()
        replies = await asyncio.gather(*requests)
        assert [reply.status_code for reply in replies] == [200] * 3
        bits += [array.tobytes() for array in load_tensors(replies[1].content, finite=False).arrays.values()]
        past, past_of_a = past + n, past_of_a + n_of_a
    return bits
