"""A pass that needs more memory than the device has: refused for now, rolled back, what it had made is let go."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.attention.view import PagedView
from engine.batch import Append, ExportPast, ImportPast
from engine.errors import DeviceFull, DeviceLost, ModelFailed
from engine.layers import MultiHeadAttention
from engine.models.attention import AttentionModel, attention_spec
from engine.runner import ModelRunner
from tests.engine.models import Served, backend

HIDDEN = 8


class Scarce(AttentionModel):
    """Has room for `room` queries; notices whether what it made before there was none is let go."""

    room = 10
    made: "weakref.ref[Tensor] | None" = None

    def forward(self, inputs: dict[str, Tensor], kv: PagedView) -> Tensor:
        out = super().forward(inputs, kv)  # keys and values are written by then
        if len(out) > self.room:
            self.made = weakref.ref(out)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return out


@pytest.fixture
def served() -> Served:
    layer = MultiHeadAttention(HIDDEN, 2, compute_dtype=torch.float32).requires_grad_(False).eval()
    spec = attention_spec("scarce", layer, kv_dtype="float32", max_length=200, fingerprint="")
    return Served(ModelRunner(Scarce(spec, layer), backend("sdpa"), 12, 16))


def inputs(count: int) -> dict[str, Any]:
    wide = np.random.default_rng(count).normal(size=(1, count, HIDDEN)).astype(np.float32)
    return {"query": wide, "key": wide, "value": wide, "attention_mask": np.ones((1, count, count), np.float32)}


def test_too_large_a_pass_is_refused_for_now_and_rolled_back(served: Served) -> None:
    session = served.open()
    before = served.engine.capacity()
    with pytest.raises(DeviceFull, match="try again later") as refused:
        served.append(session, inputs(40))
    info = served.engine.session(session)
    assert (served.engine.capacity(), info.valid_length, info.version, info.state) == (before, [0], 0, "idle")
    assert refused.value.__cause__ is refused.value.__context__ is None
    model = served.runner.model
    assert isinstance(model, Scarce)
    assert model.made is not None
    assert model.made() is None  # what the pass had made is free again
    assert served.append(session, inputs(5)).valid_length == [5]


class Full(ModelRunner):
    """Has no room for a past beside the pool."""

    def _past_blocks(self, tables: list[list[int]], lengths: list[int]) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_a_past_that_cannot_be_gathered_stays_where_it_is(served: Served) -> None:
    full = Served(Full(served.runner.model, backend("sdpa"), 12, 16))
    session = full.open()
    full.append(session, inputs(5))
    with pytest.raises(DeviceFull):
        full.finish(ExportPast(session))
    info = full.engine.session(session)
    assert (info.valid_length, info.version, info.state) == ([5], 1, "idle")
    other = served.open()
    served.append(other, inputs(5))
    past, empty = served.finish(ExportPast(other)).past, full.open()
    with pytest.raises(DeviceFull):
        full.finish(ImportPast(empty, past))
    assert full.engine.session(empty).valid_length == [0]
    full.engine.check()


def test_only_what_does_not_fit_alone_is_refused(served: Served) -> None:
    """Together they pass the room, as does the third by itself."""
    appends = [Append(served.open(), inputs(count)) for count in (6, 7, 12)]
    for append in appends:
        served.engine.submit(append)
    while served.engine.run_once():
        served.engine.check()
    assert [append.future.result(0).valid_length for append in appends[:2]] == [[6], [7]]
    assert isinstance(appends[2].future.exception(0), DeviceFull)
    assert served.engine.session(appends[2].session_id).valid_length == [0]


class Faulty(AttentionModel):
    def forward(self, inputs: dict[str, Tensor], kv: PagedView) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize("lost", [False, True])
def test_a_device_that_answers_nothing_any_more_ends_the_engine_and_a_failed_batch_does_not(lost: bool) -> None:
    def synchronize() -> None:
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    layer = MultiHeadAttention(HIDDEN, 2, compute_dtype=torch.float32).requires_grad_(False).eval()
    spec = attention_spec("faulty", layer, kv_dtype="float32", max_length=200, fingerprint="")
    served = Served(ModelRunner(Faulty(spec, layer), backend("sdpa"), 12, 16, synchronize=synchronize))
    append = Append(served.open(), inputs(5))
    served.engine.submit(append)
    if lost:
        with pytest.raises(DeviceLost, match="does not answer any more: an illegal memory access"):
            served.engine.run_once()
    else:
        served.engine.run_once()
        assert isinstance(append.future.exception(0), ModelFailed)
