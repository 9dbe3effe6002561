"""An output's bits depend on its session's own positions alone: a matrix of chunkings, batch mates, forks and
rollbacks, each against the session prefilled at once and alone, on the native kernels. Elsewhere `exact` is refused."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.batch import Append, Truncate, Want
from engine.errors import InvalidInput
from engine.loading import LoadOptions, load_model
from engine.models import build
from engine.models.base import LoadOptions as ModelOptions
from engine.parallel import Parallel, Ranks
from engine.runner import ModelRunner
from tests.engine.models import CACHE, Served, backend, reference_model, serve_checkpoint
from tests.pace import slow_but

MATES = (0, 1, 13)
ROUTES = ("straight", "forked", "forked earlier", "rolled back", "rolled back inside a block")
LAST = 12  # positions whose outputs are compared
BEYOND = 21  # positions that are computed and given up on the way


@dataclass
class World:
    """`give(session, begin, end)` appends positions of one fixed sequence and asks for every output."""

    served: Served
    give: Callable[[str, int, int], Append]
    chunkings: list[list[int]]

    def finish(self, appends: list[Append]) -> list[np.ndarray]:
        """All of them at once, so that they share batches. Each one's output, (n, width)."""
        for append in appends:
            self.served.engine.submit(append)
        while self.served.engine.run_once():
            self.served.engine.check()
        return [next(iter(append.future.result(0).outputs.values()))[0] for append in appends]

    def outputs(self, chunks: list[int], mates: int, route: str) -> np.ndarray:
        """Of the last positions of a session that grows by `chunks`, and goes its `route` before the middle one."""
        session, others = self.served.open(), [self.served.open() for _ in range(mates)]
        found, at = [], 0
        for index, chunk in enumerate(chunks):
            if index == len(chunks) // 2:
                session = self.detour(session, at, route)
            company = [self.give(other, index, index + 1) for other in others]
            found.append(
                self.finish([*company[1:], self.give(session, at, at + chunk), *company[:1]])[len(company[1:])]
            )
            at += chunk
        for each in (session, *others):
            self.served.engine.delete_session(each)
        return np.concatenate(found)[-LAST:]

    def detour(self, session: str, at: int, route: str) -> str:
        """Returns a session that has the same `at` positions."""
        if route == "straight":
            return session
        if route == "forked":  # the parent goes on in the block that both share
            return self.fork(session, None, at)
        self.finish([self.give(session, at, at + BEYOND)])
        if route == "forked earlier":
            return self.fork(session, at, at + BEYOND)
        for length in (at,) if route == "rolled back" else (at + 3, at + 1, at):
            self.served.finish(Truncate(session, length))
        return session

    def fork(self, session: str, length: int | None, at: int) -> str:
        child = self.served.engine.fork(session, at=length)[0].id
        self.finish([self.give(session, at, at + 1)])
        self.served.engine.delete_session(session)
        return child


def decoder(family: str, dtype: torch.dtype, path: Path, int8: bool = False) -> World:
    reference_model(family).save_pretrained(path)
    served = serve_checkpoint(path, dtype=dtype, kv_dtype="float16", token_budget=48, int8=int8)
    tokens = np.random.default_rng(1).integers(0, 89, (1, 200))

    def give(session: str, begin: int, end: int) -> Append:
        return Append(session, {"token_ids": tokens[:, begin:end]}, want=Want(logits="all"))

    return World(served, give, [[50], [20, *[1] * 30], [16, 16, 18], [5, 28, 17]])


def attention(dtype: str, options: str, path: Path) -> World:
    """Past a chunk of the kernels' keys, so that partial sums are merged."""
    spec = f"attention:hidden=48,heads=6{options}"
    model = build("layer", spec, ModelOptions(CACHE, dtype=dtype, kernels=True), print).model
    served = Served(ModelRunner(model, backend("cpu"), 600, 16), token_budget=256)
    drawn = {
        name: np.random.default_rng(seed).normal(size=(1, 800, 48)).astype(np.float32)
        for seed, name in enumerate(("query", "key", "value"))
    }

    def give(session: str, begin: int, end: int) -> Append:
        inputs = {name: array[:, begin:end] for name, array in drawn.items()}
        return Append(session, {**inputs, "attention_mask": np.tri(end - begin, end, begin, dtype=np.float32)[None]})

    return World(served, give, [[540], [510, *[1] * 30], [256, 256, 28], [511, 1, 28]])


WORLDS: dict[str, Callable[[Path], World]] = {
    "llama bfloat16": partial(decoder, "llama-tied-biased", torch.bfloat16),
    "llama float32": partial(decoder, "llama-tied-biased", torch.float32),
    "llama float16": partial(decoder, "llama-tied-biased", torch.float16),
    "llama int8": partial(decoder, "llama", torch.bfloat16, int8=True),
    "qwen3": partial(decoder, "qwen3", torch.bfloat16),
    "gpt2": partial(decoder, "gpt2", torch.bfloat16),
    "attention bfloat16": partial(attention, "bfloat16", ""),
    "attention float32": partial(attention, "float32", ""),
    "attention with all options": partial(
        attention, "float16", ",kv_heads=2,rotary=10000,add_bias_kv=1,add_zero_attn=1"
    ),
}


@pytest.mark.parametrize("name", slow_but(WORLDS, {"llama bfloat16", "llama int8", "attention with all options"}))
def test_every_way_to_a_position_gives_its_bits(name: str, tmp_path: Path) -> None:
    world = WORLDS[name](tmp_path)
    expected = world.outputs(world.chunkings[0], 0, "straight")
    assert np.isfinite(expected).all()
    assert len(np.unique(expected)) > LAST
    for chunks, mates, route in itertools.product(world.chunkings, MATES, ROUTES):
        got = world.outputs(chunks, mates, route)
        assert np.array_equal(got, expected), (len(chunks), mates, route)


# ---- who may ask for it ----


def options(**given: object) -> LoadOptions:
    return LoadOptions(CACHE, kv_memory=4 << 20, exact=True, **given)  # type: ignore[arg-type]


def test_the_kernels_promise_it() -> None:
    assert load_model("layer", "attention:hidden=32,heads=2", options(), print).runner.backend.name == "cpu"


def test_elsewhere_it_is_refused_and_what_differs_is_named() -> None:
    with pytest.raises(InvalidInput, match="linears and attention without the native kernels") as refused:
        load_model("layer", "attention:hidden=32,heads=2", options(backend="sdpa"), print)
    assert refused.value.field == "exact"


def test_three_ranks_may_add_in_another_order() -> None:
    ranks = Parallel(Ranks(None, 0, 1), Ranks(None, 0, 3))  # type: ignore[arg-type]  # never reached: there is no group
    with pytest.raises(InvalidInput, match="the sum over 3 ranks"):
        load_model("layer", "attention:hidden=48,heads=6", options(parallel=ranks), print)
