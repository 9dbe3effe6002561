"""FlashInfer's part, by a stand-in that does in plain arithmetic what its documentation says; and when it is chosen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import choose
from engine.attention.base import Backend
from engine.attention.flashinfer import FlashInferBackend
from engine.errors import InvalidInput
from tests.engine.attention_cases import Case, World, make, reference
from tests.engine.triton_cases import HALF, TOLERANCE, close

CACHE = Path.home() / ".cache" / "keypast"
STEPS = Case((0, 15, 16, 40), (1, 1, 1, 1), heads=4, head_dim=64, dtype=HALF, cache_dtype=HALF, rotary_dim=16)


class FakeFlashInfer:
    """BatchDecodeWithPagedKVCacheWrapper as in flashinfer 0.7: pages (page, kv_head, offset, channel)."""

    def __init__(self) -> None:
        self.plans = self.runs = 0
        self.tensor_cores: bool | None = None

    def BatchDecodeWithPagedKVCacheWrapper(  # noqa: N802
        self, workspace: Tensor, layout: str, *, use_tensor_cores: bool
    ) -> "FakeFlashInfer":
        assert (layout, len(workspace), bool(workspace.any())) == ("HND", 128 << 20, False)
        self.tensor_cores = use_tensor_cores
        return self

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        assert {each.dtype for each in (indptr, indices, last_page_len)} == {torch.int32}
        assert q_data_type == kv_data_type == HALF
        self.pages = indptr.tolist(), indices.tolist(), last_page_len.tolist(), page_size, sm_scale
        self.plans += 1

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        assert all(each.is_contiguous() for each in (q, *pages))
        indptr, indices, last, size, scale = self.pages
        self.runs += 1
        out = torch.empty_like(q)
        for row in range(len(q)):
            own = indices[indptr[row] : indptr[row + 1]]
            length = (len(own) - 1) * size + last[row]
            k, v = (each[own].transpose(0, 1).flatten(1, 2)[:, :length].float() for each in pages)
            group = q.shape[1] // k.shape[0]
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            weights = torch.softmax((k @ q[row].float()[:, :, None])[..., 0] * scale, -1)
            out[row] = (weights[:, None] @ v)[:, 0].to(q.dtype)
        return out


def natural(w: World, steps: bool = True) -> World:
    blocks = w.k_blocks.transpose(2, 3).contiguous().transpose(2, 3)
    return replace(w, k_blocks=blocks, inputs=replace(w.inputs, steps=steps))


def test_steps_are_its_and_each_pass_is_planned_once() -> None:
    library = FakeFlashInfer()
    backend = FlashInferBackend(library)
    for seed in (0, 1):
        w = natural(make(replace(STEPS, seed=seed)))
        for _ in range(3):  # layers of one pass
            close(w.attend(backend), reference(w), TOLERANCE[HALF])
    assert (library.plans, library.runs, library.tensor_cores) == (2, 6, False)


def test_many_heads_that_share_their_keys_go_to_the_tensor_cores() -> None:
    library = FakeFlashInfer()
    w = natural(make(replace(STEPS, heads=8)))
    close(w.attend(FlashInferBackend(library)), reference(w), TOLERANCE[HALF])
    assert library.tensor_cores is True


@pytest.mark.parametrize(
    "case",
    [
        replace(STEPS, dtype=torch.float32),
        replace(STEPS, causal=False, biased=True),
        replace(STEPS, extras=1),
        replace(STEPS, head_dim=16),
        replace(STEPS, new=(1, 2, 1, 3)),
    ],
)
def test_the_rest_is_our_own_kernels(case: Case) -> None:
    library = FakeFlashInfer()
    w = natural(make(case), steps=set(case.new) == {1})
    close(w.attend(FlashInferBackend(library)), reference(w), TOLERANCE[HALF])
    assert library.plans == 0


def chosen(name: str, library: Any, times: dict[str, float], warn: Callable[[str], None] = print) -> Backend:
    def seconds(backend: Backend) -> float:
        if times[backend.name] < 0:
            raise RuntimeError("no compiler")
        return times[backend.name]

    return choose(name, "cuda", CACHE, warn, flashinfer=lambda: library, seconds=seconds, tried=runs)


def runs(backend: Backend, device: str) -> None:
    """Every backend does on this device."""


@pytest.mark.parametrize(
    ("theirs", "name"), [(0.5, "flashinfer"), (0.85, "flashinfer"), (0.95, "triton"), (2, "triton")]
)
def test_it_is_chosen_where_it_is_clearly_faster(theirs: float, name: str) -> None:
    assert chosen("auto", FakeFlashInfer(), {"triton": 1.0, "flashinfer": theirs}).name == name


def test_one_that_fails_when_it_is_timed_is_told_of_and_not_chosen() -> None:
    told: list[str] = []
    assert chosen("auto", FakeFlashInfer(), {"triton": 1.0, "flashinfer": -1}, told.append).name == "triton"
    assert told == ["the attention backend flashinfer is installed and does not work here: no compiler"]


def test_a_backend_that_is_named_is_not_timed() -> None:
    assert chosen("flashinfer", FakeFlashInfer(), {}).name == "flashinfer"
    assert chosen("triton", FakeFlashInfer(), {}).name == "triton"


def test_where_steps_will_be_recorded_only_what_can_be_is_chosen() -> None:
    backend = choose("auto", "cuda", CACHE, print, recorded=True, flashinfer=FakeFlashInfer, tried=runs)
    assert (backend.name, backend.recordable) == ("triton", True)


def test_without_the_library_it_is_not_there() -> None:
    assert chosen("auto", None, {}).name == "triton"
    with pytest.raises(InvalidInput, match=r"pip install 'keypast\[flashinfer\]'"):
        chosen("flashinfer", None, {})
