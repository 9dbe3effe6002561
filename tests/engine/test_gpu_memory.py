"""How much of a GPU's memory the past gets, and what is recorded at start, told by a GPU that is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import InvalidInput
from engine.graphs import Computed
from engine.loading import LoadOptions, load_model
from tests.engine.fake_device import FakeDevice
from tests.engine.models import CACHE, reference_model

MIB = 1 << 20


class FakeGpu:
    """Has `left` bytes once weights are there; passes take `takes` bytes, one after the other."""

    def __init__(self, left: int, takes: list[int]) -> None:
        self.left, self.takes = left, takes
        self.events: list[str] = []
        self.device = FakeDevice()

    def free(self) -> int:
        self.events.append("free")
        return self.left

    def peak(self, run: Callable[[], object]) -> int:
        run()
        self.events.append("peak")
        return self.takes[self.events.count("peak") - 1]

    def graphs(self) -> FakeDevice:
        self.events.append("graphs")
        return self.device


def options(gpu: FakeGpu, **given: Any) -> LoadOptions:
    common = {"kv_memory": 1 * MIB, "kv_share": 0.5, "max_rows": 4, "token_budget": 32, "dtype": "float32"}
    return LoadOptions(CACHE, gpu=gpu, **{**common, **given})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    reference_model("llama").save_pretrained(path)
    return path


def test_the_past_gets_its_share_of_what_the_largest_batches_leave(llama: Path) -> None:
    gpu = FakeGpu(64 * MIB, [10 * MIB, 14 * MIB])
    told: list[str] = []
    runner = load_model("tiny", str(llama), options(gpu), told.append).runner
    assert gpu.events == ["peak", "peak", "free", "graphs"]
    block_bytes = runner.spec.kv.position_bytes * 16
    assert runner.blocks == 20 * MIB // block_bytes + 1
    assert "tiny: 0.0 GiB for keys and values" in told
    assert told[-1] == "tiny: recording steps 3/3: 1 rows, 16 blocks each"


def test_an_amount_is_taken_as_it_is(llama: Path) -> None:
    gpu = FakeGpu(0, [])
    runner = load_model("tiny", str(llama), options(gpu, kv_share=None), print).runner
    assert gpu.events == ["graphs"]
    assert runner.blocks == MIB // (runner.spec.kv.position_bytes * 16) + 1


def test_too_little_is_said_so(llama: Path) -> None:
    with pytest.raises(InvalidInput, match="kv_memory: 0 bytes hold no block of tiny"):
        load_model("tiny", str(llama), options(FakeGpu(5 * MIB, [3 * MIB, 3 * MIB])), print)


class Crowded(FakeDevice):
    def record(self, run: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


class CrowdedGpu(FakeGpu):
    def peak(self, run: Callable[[], object]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_what_does_not_fit_at_start_names_what_to_change(llama: Path) -> None:
    gpu = FakeGpu(64 * MIB, [0, 0])
    gpu.device = Crowded()
    with pytest.raises(InvalidInput, match="kv_memory: 33554432 bytes do not fit beside the weights of tiny"):
        load_model("tiny", str(llama), options(gpu), print)
    with pytest.raises(InvalidInput, match="max_rows: a batch of tiny does not fit beside its weights"):
        load_model("tiny", str(llama), options(CrowdedGpu(64 * MIB, [])), print)


@pytest.mark.parametrize("given", [{"graphs": False}, {"backend": "sdpa"}])
def test_nothing_is_recorded_where_it_is_not_wanted_or_cannot_be(llama: Path, given: dict[str, Any]) -> None:
    gpu = FakeGpu(64 * MIB, [0, 0])
    load_model("tiny", str(llama), options(gpu, **given), print)
    assert gpu.device.events == []


def test_a_layer_is_rehearsed_and_not_recorded() -> None:
    gpu = FakeGpu(64 * MIB, [0, 0])
    load_model("layer", "attention:hidden=32,heads=4,max_length=64", options(gpu), print)
    assert gpu.events == ["peak", "peak", "free", "graphs"]
    assert gpu.device.events == []
