"""When the host waits for a GPU, told by one that is none: fake tensors on "cuda", and every copy to or from it seen.

A copy from memory that is not pinned, or one that is not told not to block, waits for all that the device has to do.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks.gpu_step import SMALL
from engine.attention.base import Rotary
from engine.attention.cuda import TritonBackend
from engine.batch import Append, Array, Generate, Sample, Want
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.decoder import DecoderModel, decoder_spec
from engine.runner import ModelRunner
from tests.engine.compile_triton import Recorder

CONFIG = replace(
    SMALL,
    vocab_size=50,
    hidden_size=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    intermediate_size=48,
    max_length=64,
)


class Told:
    """What was read of a device that is none: zeros."""

    def __init__(self, tensor: Tensor) -> None:
        self._zeros = np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))

    def numpy(self) -> Array:
        return self._zeros


class Watched(TorchFunctionMode):
    """`waits`: what made the host wait, one name each. Reading a value in any other way fails: there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "pin_memory":
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if name == "cpu" and args[0].device.type == "cuda":
            self.waits.append("a copy to the host")
            return Told(args[0])
        given = (*args, *kwargs.values()) if name in {"tensor", "as_tensor", "to"} else ()
        places = [torch.device(each) for each in given if isinstance(each, str | torch.device)]
        if name != "to" and any(place.type == "cuda" for place in places):
            self.waits.append("a copy from the host")
        if name == "to" and places and places[0].type != args[0].device.type:
            staged = kwargs.get("non_blocking", False) and any(each is args[0] for each in self._pinned)
            if not staged:
                self.waits.append(f"a copy {'from' if places[0].type == 'cuda' else 'to'} the host")
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=places[0])
        return func(*args, **kwargs)


def fake_engine() -> Engine:
    """Over a model on a device that is none."""
    spec = decoder_spec("fake", CONFIG, dtype="float16", kv_dtype="float16", device="cuda", fingerprint="")
    tables = torch.empty(2, CONFIG.max_length, CONFIG.head_dim // 2, device="cuda").unbind()
    with torch.device("meta"):
        model = DecoderModel(spec, CONFIG, Rotary(*tables)).requires_grad_(False).eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = {name: torch.empty(shape, dtype=torch.float16, device="cuda") for name, shape in shapes.items()}
    model.load_state_dict(weights, assign=True)
    runner = ModelRunner(model, TritonBackend(kernels=Recorder()), 40, 16)
    return Engine([runner], EngineConfig(token_budget=64))


def waits_of(engine: Engine, watched: Watched) -> list[list[str]]:
    """Of each pass that there is to run."""
    told: list[list[str]] = []
    while True:
        watched.waits.clear()
        if not engine.run_once():
            return told
        told.append(list(watched.waits))


SAMPLES = {
    "greedy": Sample(),
    "drawn": Sample(temperature=0.8, top_p=0.9, top_k=10, min_p=0.1),
}


@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_a_pass_waits_once_for_the_tokens_that_it_drew(sample: str) -> None:
    """Prefills, prefills beside steps, and steps, of several rows, with all that can be told of a token."""
    generations = []
    with FakeTensorMode(allow_non_fake_inputs=True), Watched() as watched:
        engine = fake_engine()
        for length in (3, 20, 60, 1):  # the third is prefilled in chunks, beside the others' steps
            prompt = {"token_ids": np.ones((1, length), dtype=np.int64)}
            session = engine.create_session("fake").id
            generations.append(Generate(session, 4, sample=SAMPLES[sample], logprobs=True, inputs=prompt))
            engine.submit(generations[-1])
        told = waits_of(engine, watched)
    for generation in generations:
        assert generation.future.result(0).token_ids == [[0] * 4]
    assert len(told) > 4
    assert all(waits in ([], ["a copy to the host"]) for waits in told), told
    assert ["a copy to the host"] in told


@torch.inference_mode()
def test_what_else_is_told_is_a_copy_each() -> None:
    """Of all rows, however many."""
    want = Want(logits="last", top_logprobs=3, sample=Sample(), logprob=True)
    with FakeTensorMode(allow_non_fake_inputs=True), Watched() as watched:
        engine = fake_engine()
        for rows in (1, 3):
            session = engine.create_session("fake", batch_size=rows).id
            engine.submit(Append(session, {"token_ids": np.ones((rows, 2), dtype=np.int64)}, want=want))
        told = waits_of(engine, watched)
    assert [waits for waits in told if waits] == [["a copy to the host"] * 3]


@torch.inference_mode()
def test_what_waits_is_seen() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Watched() as watched:
        there = torch.zeros(3).to("cuda")
        torch.zeros(3).to("cuda", non_blocking=True)
        torch.zeros(3).pin_memory().to("cuda")
        torch.tensor([1, 2], device="cuda")
        assert there.cpu().numpy().tolist() == [0, 0, 0]
        torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
        for read in (there.tolist, there.nonzero):  # there is no value to be had in any other way
            with pytest.raises((RuntimeError, DataDependentOutputException, DynamicOutputShapeException)):
                read()
    assert watched.waits == [*["a copy from the host"] * 4, "a copy to the host"]
