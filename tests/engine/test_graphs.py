"""Steps that are played back: buckets, buffers and their order on a device that is none, and tokens as without."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from engine.attention.base import AttentionInputs, Backend
from engine.attention.cuda import TritonBackend
from engine.attention.sdpa import SdpaBackend
from engine.batch import Append, Array, Batch, Generate, RowResult, Sample, Truncate, Want
from engine.checkpoints.weights import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CELLS, Computed, StepGraphs, row_buckets, width_buckets
from engine.models.build import load_decoder
from engine.runner import ModelRunner
from tests.engine.compile_triton import Recorder
from tests.engine.fake_device import FakeDevice
from tests.engine.models import backend, reference_model


def quiet(text: str) -> None:
    pass


def test_buckets() -> None:
    assert row_buckets(1) == [1]
    assert row_buckets(8) == [1, 2, 4, 8]
    assert row_buckets(100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert width_buckets(1) == [1]
    assert width_buckets(63) == [16, 63]
    assert width_buckets(2048) == [32, 128, 512, 2048]


def echo(tokens: Tensor, inputs: AttentionInputs) -> Computed:
    """What a step's kernels would read, a line a row."""
    lines = [tokens, inputs.positions, inputs.slots, inputs.past_length, inputs.present_length, inputs.query_start[:-1]]
    assert (inputs.steps, inputs.causal, inputs.bias) == (True, True, None)
    assert (tokens.dtype, inputs.positions.dtype, inputs.slots.dtype) == (torch.int64,) * 3
    return Computed(torch.cat([torch.stack(lines, 1), inputs.block_table], 1), None)  # type: ignore[arg-type]


def step(rows: int, width: int, seed: int = 0) -> tuple[Array, dict[str, Array]]:
    draw = np.random.default_rng(seed)
    attention = {name: draw.integers(1, 99, rows) for name in ("positions", "slots", "past_length", "present_length")}
    attention["block_table"] = draw.integers(1, 99, (rows, width)).astype(np.int32)
    return draw.integers(1, 99, rows), attention


@given(steps=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 40)), min_size=1, max_size=5))
def test_what_a_step_brings_is_what_its_rows_read_and_the_rest_is_nothing(steps: list[tuple[int, int]]) -> None:
    """One step after another: nothing of an earlier one is seen by a later one."""
    graphs = StepGraphs(FakeDevice(), echo, 6, 33, quiet)
    for seed, (rows, width) in enumerate(steps):
        tokens, attention = step(rows, width, seed)
        made = graphs.play(tokens, attention)
        if rows > 6 or width > 33:
            assert made is None
            continue
        assert made is not None
        names = ("positions", "slots", "past_length", "present_length")
        expected = np.stack([tokens, *(attention[name] for name in names), np.arange(rows)], 1)
        assert np.array_equal(made.hidden[:, :6], expected)
        assert np.array_equal(made.hidden[:, 6 : 6 + width], attention["block_table"])
        assert not made.hidden[:, 6 + width :].any()
        bucket = graphs.bucket(rows, width)
        assert bucket is not None
        padding = graphs._recorded[bucket][1].hidden[rows:]
        assert not padding[:, :5].any()
        assert not padding[:, 6:].any()


def test_the_largest_is_recorded_first_and_a_step_is_one_upload_and_one_play() -> None:
    device = FakeDevice()
    told: list[str] = []
    graphs = StepGraphs(device, echo, 4, 64, told.append)
    assert [event for event in device.events if event.startswith("record")] == [
        "record 4", "record 2", "record 1", "record 4", "record 2", "record 1",
    ]  # fmt: skip
    assert (told[0], told[-1]) == (
        "recording steps 1/6: 4 rows, 64 blocks each",
        "recording steps 6/6: 1 rows, 16 blocks each",
    )
    device.events.clear()
    for rows, width in ((3, 16), (1, 17)):
        graphs.play(*step(rows, width))
    assert device.events == [f"upload {5 * 4 + 4 * 16}", "play 3", f"upload {5 * 4 + 64}", "play 2"]


def test_all_recordings_leave_what_they_make_in_the_same_place() -> None:
    """Logits of every recording side by side would take a GPU's memory for good."""

    def forward(tokens: Tensor, inputs: AttentionInputs) -> Computed:
        wide = tokens[:, None].float()
        return Computed(wide.expand(-1, 3), None, wide.expand(-1, 50) + 1)  # type: ignore[arg-type]

    graphs = StepGraphs(FakeDevice(), forward, 4, 64, quiet)
    places = set()
    for rows, width in ((1, 1), (4, 64), (3, 20)):
        tokens, attention = step(rows, width)
        made = graphs.play(tokens, attention)
        assert made is not None
        assert made.logits is not None
        assert made.hidden[:, 2].tolist() == tokens.tolist()
        assert made.logits[:, 49].tolist() == (tokens + 1).tolist()
        places.add((made.hidden.data_ptr(), made.logits.data_ptr()))
    assert len(places) == 1


def test_a_table_too_large_for_any_recording_is_left_to_the_eager_pass() -> None:
    device = FakeDevice()
    graphs = StepGraphs(device, echo, 256, CELLS // 64, quiet)
    assert graphs.bucket(64, CELLS // 64) == (64, CELLS // 64)
    assert graphs.bucket(65, CELLS // 64) is None
    assert graphs.bucket(65, CELLS // 256) == (128, CELLS // 256)


# ---- in an engine ----


class Seen(ModelRunner):
    """Shows what the last pass left its sessions for the next."""

    tails: tuple[Tensor, ...] = ()

    def run(self, batch: Batch) -> list[RowResult]:
        results = super().run(batch)
        self.tails = tuple(result.tail for result in results)
        return results


class Both:
    """The same model twice: steps played back, and not."""

    def __init__(self, path: Any, max_rows: int = 4) -> None:
        self.device = FakeDevice()
        self.engines, self.runners = [], []
        for recorded in (True, False):
            model = load_decoder("tiny", Checkpoint.open(path), device="cpu", dtype=torch.float32, kv_dtype="float32")
            runner = Seen(model, backend("sdpa"), 60, 16)
            if recorded:
                runner.record_steps(self.device, max_rows, quiet)
            self.runners.append(runner)
            self.engines.append(Engine([runner], EngineConfig(token_budget=64)))
        self.device.events.clear()

    @property
    def played(self) -> int:
        return sum(event.startswith("play") for event in self.device.events)

    def generate(self, prompts: list[list[int]], sample: Sample) -> list[list[list[int]]]:
        """Each engine's tokens of all prompts, generated side by side."""
        told = []
        for engine in self.engines:
            sessions = [engine.create_session("tiny").id for _ in prompts]
            for session, prompt in zip(sessions, prompts, strict=True):
                engine.submit(Append(session, {"token_ids": np.array([prompt])}))
            generations = [Generate(session, 6, sample=sample) for session in sessions]
            for generation in generations:
                engine.submit(generation)
            while engine.run_once():
                engine.check()
            told.append([generation.future.result(0).token_ids[0] for generation in generations])
        return told


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("llama")
    reference_model("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize("sample", [Sample(), Sample(temperature=0.9, top_p=0.8, seed=3), Sample(repetition_penalty=2)])
def test_a_generation_is_the_same_whether_its_steps_are_played_back(checkpoint: Any, sample: Sample) -> None:
    both = Both(checkpoint)
    recorded, eager = both.generate([[1, 2, 3], [7, 8, 9, 10, 11], [4]], sample)
    assert recorded == eager
    assert both.played > 5


def test_more_rows_than_any_recording_has_and_prefills_run_as_ever(checkpoint: Any) -> None:
    both = Both(checkpoint, max_rows=2)
    recorded, eager = both.generate([[1, 2, 3], [7, 8, 9], [4, 5]], Sample())
    assert recorded == eager


def test_a_session_that_idles_keeps_its_own_tail_and_not_the_batchs(checkpoint: Any) -> None:
    both = Both(checkpoint)
    for engine, runner in zip(both.engines, both.runners, strict=True):
        sessions = [engine.create_session("tiny").id for _ in range(3)]
        for tokens in ([1, 2, 3], [4]):
            for session in sessions:
                engine.submit(Append(session, {"token_ids": np.array([tokens])}))
            while engine.run_once():
                engine.check()
            assert {tail.untyped_storage().nbytes() for tail in runner.tails} == {runner.tails[0].nbytes}
            assert len({tail.data_ptr() for tail in runner.tails}) == 3
    assert both.played == 1


def test_all_outputs_of_a_step_and_of_its_replay(checkpoint: Any) -> None:
    both = Both(checkpoint)
    want = Want(logits="all", top_logprobs=3, sample=Sample(), logprob=True)
    told: list[list[Any]] = []
    for engine in both.engines:
        session, outputs = engine.create_session("tiny", batch_size=2).id, []
        for tokens in ([[1, 2], [3, 4]], [[5], [6]]):
            append = Append(session, {"token_ids": np.array(tokens)}, want=want)
            engine.submit(append)
            while engine.run_once():
                engine.check()
            made = append.future.result(0).outputs
            outputs.append({name: np.array(value, dtype=object).tolist() for name, value in made.items()})
        generation = Generate(session, 1)
        engine.submit(Truncate(session, 2))  # the last position has no tail then, and is computed again
        engine.submit(generation)
        while engine.run_once():
            engine.check()
        told.append([*outputs, generation.future.result(0).token_ids])
    assert both.played == 3
    assert repr(told[0]) == repr(told[1])


def record_without_values(checkpoint: Any, backend: Backend) -> None:
    """Fake tensors have no values that could be read on the host."""
    source = Checkpoint.open(checkpoint)
    model = load_decoder("tiny", source, device="cpu", dtype=torch.float32, kv_dtype="float16", kernels=False)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        ModelRunner(model, backend, 20, 16).record_steps(FakeDevice(), 4, quiet)


def test_a_step_of_the_gpu_backend_waits_for_nothing(checkpoint: Any) -> None:
    kernels = Recorder()
    record_without_values(checkpoint, TritonBackend(kernels=kernels))
    assert set(kernels.launches) == {"decode", "merge_splits", "rotate_and_write", "rms_norm", "silu_gate"}
    with pytest.raises(DataDependentOutputException):
        record_without_values(checkpoint, SdpaBackend())
