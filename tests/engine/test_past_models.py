"""Pasts of real models of both kinds: what is exported is what torch computes, and an import goes on exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.batch import ExportPast, Generate, ImportPast, SessionPast, Truncate, Want
from engine.errors import InvalidInput
from engine.models import build
from engine.models.base import LoadOptions
from engine.runner import ModelRunner
from tests.engine.models import CACHE, Served, backend, reference_model, serve_checkpoint

HIDDEN, HEADS = 24, 3
LENGTHS = [40, 1, 17, 16]
ALL = Want(logits="all")
Serve = Callable[[], Served]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    reference_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "layer.safetensors"
    generator = torch.Generator().manual_seed(5)
    shapes = {"weight": (HIDDEN, HIDDEN), "bias": (HIDDEN,)}
    names = [(f"{part}_proj.{name}", shape) for part in "qkvo" for name, shape in shapes.items()]
    save_file({name: torch.randn(shape, generator=generator) * 0.3 for name, shape in names}, path)
    return path


def serve_attention(weights: Path, backend_name: str = "cpu", kv_dtype: str = "float32") -> Served:
    spec = f"attention:hidden={HIDDEN},heads={HEADS},weights={weights}"
    loaded = build(
        "layer", spec, LoadOptions(CACHE, dtype="float32", kv_dtype=kv_dtype, kernels=backend_name == "cpu"), print
    )
    return Served(ModelRunner(loaded.model, backend(backend_name), 200, 16))


def export(served: Served, session: str) -> SessionPast:
    past: SessionPast = served.finish(ExportPast(session)).past
    return past


def load(served: Served, past: SessionPast) -> str:
    """A new session with that past."""
    session = served.open(len(past.valid_length))
    served.finish(ImportPast(session, past))
    return session


def told(past: SessionPast) -> dict[str, Any]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in past.arrays.items()}


def words(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 89, shape)


def tensors(n: int, past: int = 0, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    inputs = {
        name: (scale * generator.normal(size=(len(LENGTHS), n, HIDDEN))).astype(np.float32)
        for name in ("query", "key", "value")
    }
    return {**inputs, "attention_mask": np.repeat(np.tri(n, past + n, past, dtype=np.float32)[None], len(LENGTHS), 0)}


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("backend_name", ["cpu", "sdpa"])
def test_a_decoder_goes_on_exactly_in_any_engine(llama: Path, backend_name: str, kv_dtype: str) -> None:
    served, other = (serve_checkpoint(llama, backend_name=backend_name, kv_dtype=kv_dtype) for _ in range(2))
    session = served.open(len(LENGTHS))
    ids = words((len(LENGTHS), 41))
    served.append(session, {"token_ids": ids}, batch_valid_length=[length + 1 for length in LENGTHS])
    served.finish(Truncate(session, LENGTHS))
    past = export(served, session)
    assert past.arrays["key_past.2"].dtype == (np.float16 if kv_dtype == "float16" else np.float32)
    assert past.arrays["token_ids"][2, :17].tolist() == ids[2, :17].tolist()
    copies = [(served, load(served, past)), (other, load(other, past))]
    generated = served.finish(Generate(served.engine.fork(session)[0].id, 6)).token_ids
    step = words((len(LENGTHS), 1), seed=1)
    logits = served.append(session, {"token_ids": step}, ALL).outputs["logits"]
    for engine, copy in copies:
        assert told(export(engine, copy)) == told(past)
        assert engine.finish(Generate(engine.engine.fork(copy)[0].id, 6)).token_ids == generated
        assert np.array_equal(engine.append(copy, {"token_ids": step}, ALL).outputs["logits"], logits)


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("backend_name", ["cpu", "sdpa"])
def test_an_attention_layer_goes_on_exactly_in_any_engine(weights: Path, backend_name: str, kv_dtype: str) -> None:
    served, other = (serve_attention(weights, backend_name, kv_dtype) for _ in range(2))
    session = served.open(len(LENGTHS))
    served.append(session, tensors(40), batch_valid_length=LENGTHS)
    past = export(served, session)
    assert past.arrays["key_past.0"].shape == (4, HEADS, 8, 40)
    copies = [(served, load(served, past)), (other, load(other, past))]
    step = {name: array for name, array in tensors(1, seed=1).items() if name != "attention_mask"}
    expected = served.append(session, step, step=True).outputs["attn_out"]
    for engine, copy in copies:
        assert told(export(engine, copy)) == told(past)
        assert np.array_equal(engine.append(copy, step, step=True).outputs["attn_out"], expected)


@pytest.mark.parametrize(("kv_dtype", "rounding"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_an_attention_layer_s_file_is_what_torch_computes(weights: Path, kv_dtype: str, rounding: float) -> None:
    """k_proj and v_proj of what was appended, a head its own channels, zero past a row's length."""
    served, parameters, inputs = serve_attention(weights, kv_dtype=kv_dtype), load_file(weights), tensors(40)
    session = served.open(len(LENGTHS))
    served.append(session, inputs, batch_valid_length=LENGTHS)
    past = export(served, session)
    valid = torch.arange(40) < torch.tensor(LENGTHS)[:, None]
    for name, part in (("key", "k_proj"), ("value", "v_proj")):
        weight, bias = parameters[f"{part}.weight"], parameters[f"{part}.bias"]
        projected = torch.nn.functional.linear(torch.from_numpy(inputs[name]), weight, bias) * valid[..., None]
        heads = projected.view(len(LENGTHS), 40, HEADS, 8).transpose(1, 2)  # (B, N, T, d)
        expected = heads.transpose(2, 3) if name == "key" else heads
        got = torch.from_numpy(past.arrays[f"{name}_past.0"]).float()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=rounding)
        assert not got.masked_select(~(valid[:, None, None] if name == "key" else valid[:, None, :, None])).any()


def test_a_bfloat16_past_takes_only_what_it_can_hold_exactly(weights: Path) -> None:
    wide, narrow = serve_attention(weights), serve_attention(weights, kv_dtype="bfloat16")
    session = wide.open(len(LENGTHS))
    wide.append(session, tensors(40), batch_valid_length=LENGTHS)
    past = export(wide, session)
    with pytest.raises(InvalidInput, match=r"key_past\.0: has values that the bfloat16 past of model layer does not"):
        load(narrow, past)
    assert narrow.engine.capacity().models[0].used == 0
    for array in past.arrays.values():  # cut every number to the upper half of its bits
        array.view(np.uint32)[...] &= 0xFFFF0000
    assert told(export(narrow, load(narrow, past))) == told(past)


def test_a_past_of_other_weights_is_refused(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, other)
    source = serve_attention(weights)
    with pytest.raises(InvalidInput, match="fingerprint: is"):
        load(serve_attention(other), export(source, source.open()))
