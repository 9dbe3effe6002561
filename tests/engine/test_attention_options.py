"""Every option of `attention:`, through the engine and its paged past, against torch's layer or the textbook."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.batch import Array, Want
from engine.compat import convert
from engine.errors import InvalidInput
from engine.layers import Linear
from engine.models import build
from engine.models.attention import AttentionModel
from engine.models.base import LoadOptions
from engine.runner import ModelRunner
from tests.engine.attending import attend_in_full, random_layer, rotary_tables
from tests.engine.compat import three_namings
from tests.engine.models import CACHE, Served, backend

HIDDEN, HEADS = 24, 3
BACKENDS = ["sdpa", "cpu"]


def model(spec: str, **options: Any) -> AttentionModel:
    loaded = build("layer", spec, LoadOptions(CACHE, **{"dtype": "float32", "kv_dtype": "float32", **options}), print)
    assert isinstance(loaded.model, AttentionModel)
    return loaded.model


def serve(spec: str, backend_name: str = "sdpa", **options: Any) -> Served:
    return Served(ModelRunner(model(spec, **options), backend(backend_name), 200, 16))


def write(tmp: Path, weights: convert.Weights) -> Path:
    path = tmp / "layer.safetensors"
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}, path)
    return path


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.mark.parametrize("backend_name", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    bias=st.booleans(),
    add_bias_kv=st.booleans(),
    add_zero_attn=st.booleans(),
    kdim=st.sampled_from([HIDDEN, 10]),
    vdim=st.sampled_from([HIDDEN, 6]),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    steps=st.integers(0, 2),
    per_head=st.booleans(),
    seed=st.integers(0, 99),
)
def test_torchs_options_give_what_torch_gives(
    backend_name: str,
    directory: Path,
    bias: bool,
    add_bias_kv: bool,
    add_zero_attn: bool,
    kdim: int,
    vdim: int,
    lengths: list[int],
    steps: int,
    per_head: bool,
    seed: int,
) -> None:
    """Rows of different lengths, prefilled under a mask of their own and then stepped; weights with the past in use."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn}
    theirs = torch.nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True, kdim=kdim, vdim=vdim, **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    numeric = {name: int(value) for name, value in options.items()} | {"kdim": kdim, "vdim": vdim}
    listed = ",".join(f"{name}={value}" for name, value in numeric.items())
    path = write(directory, theirs.state_dict())
    served = serve(f"attention:hidden={HIDDEN},heads={HEADS},weights={path},{listed}", backend_name)
    batch, n = len(lengths), max(lengths)
    total = n + steps
    widths = {"query": HIDDEN, "key": kdim, "value": vdim}
    inputs = {name: numbers(seed + i, batch, total, width) for i, (name, width) in enumerate(widths.items())}
    seen = np.tri(total, dtype=bool)[None].repeat(batch, 0)
    hole = np.random.default_rng(seed).random((batch, n, n)) < 0.3
    seen[:, :n, :n] &= ~hole | np.eye(n, dtype=bool)  # a position sees itself

    want = Want(need_weights=True, average_attn_weights=not per_head)
    session = served.open(batch)
    mask = seen[:, :n, :n].astype(np.float32)
    first = {name: array[:, :n] for name, array in inputs.items()}
    results = [served.append(session, {**first, "attention_mask": mask}, want, batch_valid_length=lengths)]
    for step in range(n, total):
        chunk = {name: array[:, step : step + 1] for name, array in inputs.items()}
        results.append(served.append(session, chunk, want, step=True))

    extra = add_bias_kv + add_zero_attn
    for row, length in enumerate(lengths):
        own = [*range(length), *range(n, total)]
        hidden = torch.from_numpy(~seen[row][np.ix_(own, own)])
        query, key, value = (torch.from_numpy(array[row, own]) for array in inputs.values())
        with torch.no_grad():
            out, weights = theirs(query, key, value, attn_mask=hidden, average_attn_weights=not per_head)
        got = [results[0].outputs["attn_out"][row, :length], *(r.outputs["attn_out"][row] for r in results[1:])]
        np.testing.assert_allclose(np.concatenate(got), out, atol=2e-5)
        at = 0
        for index, result in enumerate(results):
            count, present = (length, length) if index == 0 else (1, length + index)
            columns = result.outputs["attn_weights"][row][..., :count, :]
            longest = n + index
            assert columns.shape[-1] == longest + extra
            expected = weights[..., at : at + count, :]
            np.testing.assert_allclose(columns[..., :present], expected[..., :present], atol=1e-5)
            np.testing.assert_allclose(columns[..., longest:], expected[..., len(own) :], atol=1e-5)
            assert not columns[..., present:longest].any()
            at += count


@pytest.mark.parametrize("backend_name", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([4, 6, 16]),
    rotary=st.booleans(),
    own=st.booleans(),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_grouped_heads_and_rotary_are_the_textbooks(
    backend_name: str,
    directory: Path,
    kv_heads: int,
    head_dim: int,
    rotary: bool,
    own: bool,
    chunks: list[int],
    seed: int,
) -> None:
    layer = random_layer(
        HIDDEN, 4, kv_heads=kv_heads, head_dim=head_dim, bias_kv=own, zero_attn=own, seed=seed, qkv_bias=True
    )
    spec = (
        f"attention:hidden={HIDDEN},heads=4,kv_heads={kv_heads},head_dim={head_dim},max_length=100,"
        f"add_bias_kv={int(own)},add_zero_attn={int(own)},weights={write(directory, layer.state_dict())}"
    )
    served = serve(spec + ",rotary=100" if rotary else spec, backend_name)
    tables = rotary_tables(head_dim, 100) if rotary else None
    x = numbers(seed, 1, sum(chunks), HIDDEN)
    session, at, got = served.open(), 0, []
    for n in chunks:
        chunk = x[:, at : at + n]
        inputs = {"query": chunk, "key": chunk, "value": chunk, "attention_mask": np.tri(n, at + n, at)[None]}
        inputs["attention_mask"] = inputs["attention_mask"].astype(np.float32)
        got.append(served.append(session, inputs).outputs["attn_out"][0])
        at += n
    expected, _ = attend_in_full(layer, torch.from_numpy(x[0]), tables)
    np.testing.assert_allclose(np.concatenate(got), expected, atol=5e-5)


def test_without_a_file_weights_are_drawn_from_the_seed_in_a_fixed_order() -> None:
    """So that a seeded model stays what it was: q, k, v, o; a weight, normal / sqrt(fan_in), then its bias, 0.02."""
    generator = torch.Generator().manual_seed(11)
    drawn = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        drawn[f"{name}.weight"] = torch.randn(HIDDEN, HIDDEN, generator=generator) * HIDDEN**-0.5
        drawn[f"{name}.bias"] = torch.randn(HIDDEN, generator=generator) * 0.02
    theirs = torch.nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
    theirs.load_state_dict(convert.to_torch(drawn))
    x = numbers(0, 1, 9, HIDDEN)
    served = serve(f"attention:hidden={HIDDEN},heads={HEADS},seed=11")
    inputs = {"query": x, "key": x, "value": x, "attention_mask": np.ones((1, 9, 9), np.float32)}
    got = served.append(served.open(), inputs).outputs["attn_out"]
    with torch.no_grad():
        np.testing.assert_allclose(got, theirs(*[torch.from_numpy(x)] * 3)[0], atol=1e-5)


def test_float16_on_the_cpu_is_packed_and_as_exact_as_float16() -> None:
    """float16 weights, each product summed in float32, rounded to float16 between the linears."""
    layer = random_layer(HIDDEN, HEADS).half()
    spec = f"attention:hidden={HIDDEN},heads={HEADS},dtype=float16"
    packed = model(f"{spec},seed=3").layer
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(packed, name)
        assert isinstance(linear, Linear)
        assert linear.packed is not None
        assert linear.packed.dtype == torch.float32  # float16 products are the slow path
        plain = getattr(layer, name)
        ours = Linear(HIDDEN, HIDDEN)
        ours.load_state_dict(plain.state_dict())
        ours.half().pack()
        x = torch.randn(5, HIDDEN, dtype=torch.float16)
        exact = torch.nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
        got = ours(x)
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.double(), exact, atol=1e-4, rtol=2**-11 * 1.01)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_three_namings_are_one_layer_in_float16(tmp_path: Path, backend_name: str) -> None:
    layer, inputs = three_namings.trained_layer(), three_namings.sequences(2, 20)
    expected, got = three_namings.whole(layer, inputs), []
    for path in three_namings.save_three(layer, tmp_path).values():
        spec = f"attention:hidden={three_namings.SIZE},heads={three_namings.HEADS},weights={path}"
        served = serve(spec, backend_name, dtype="float16", kv_dtype="float16")
        session = served.open(2)
        first = {name: array[:, :12] for name, array in inputs.items()}
        results = [served.append(session, {**first, "attention_mask": three_namings.causal(2, 12)})]
        steps = ({name: array[:, at : at + 1] for name, array in inputs.items()} for at in range(12, 20))
        results.extend(served.append(session, step, step=True) for step in steps)
        got.append(np.concatenate([result.outputs["attn_out"] for result in results], axis=1))
        assert (np.abs(got[-1] - expected) / np.maximum(1, np.abs(expected))).max() < 1e-2
        np.testing.assert_array_equal(got[-1], got[0])


def test_a_card_tells_the_widths() -> None:
    spec = model(f"attention:hidden={HIDDEN},heads=3,kv_heads=1,head_dim=5,kdim=7,vdim=9,add_zero_attn=1").spec
    assert {tensor.name: tensor.trailing for tensor in spec.inputs} == {
        "query": (HIDDEN,),
        "key": (7,),
        "value": (9,),
        "attention_mask": ("T",),
    }
    assert {tensor.name: tensor.trailing for tensor in spec.outputs} == {
        "attn_out": (HIDDEN,),
        "attn_weights": ("T + 1",),
    }
    assert (spec.kv.kv_heads, spec.kv.head_dim) == (1, 5)


@pytest.mark.parametrize(("name", "width"), [("key", 7), ("value", 9)])
def test_another_width_is_refused_by_name(name: str, width: int) -> None:
    served = serve(f"attention:hidden={HIDDEN},heads=3,kdim=7,vdim=9")
    inputs = {"query": numbers(0, 1, 2, HIDDEN), "key": numbers(0, 1, 2, 7), "value": numbers(0, 1, 2, 9)}
    inputs |= {"attention_mask": np.ones((1, 2, 2), np.float32), name: numbers(0, 1, 2, HIDDEN)}
    with pytest.raises(InvalidInput, match=rf"shape must be \(1, 2, {width}\)") as caught:
        served.append(served.open(), inputs)
    assert caught.value.field == name


def test_a_rotating_layer_needs_a_query_a_key() -> None:
    served = serve(f"attention:hidden={HIDDEN},heads=3,rotary=100")
    x = numbers(0, 1, 2, HIDDEN)
    session = served.open()
    mask = np.ones((1, 2, 1), np.float32)
    for inputs in ({"key": x, "value": x}, {"query": x, "key": x[:, :1], "value": x[:, :1], "attention_mask": mask}):
        with pytest.raises(InvalidInput, match="as many of both"):
            served.append(session, inputs)


def test_what_changes_the_numbers_changes_the_fingerprint() -> None:
    specs = [
        "",
        ",rotary=100",
        ",rotary=200",
        ",add_zero_attn=1",
        ",bias=0",
        ",add_bias_kv=1",
        ",kv_heads=1",
        ",seed=1",
    ]
    prints = [model(f"attention:hidden={HIDDEN},heads={HEADS}{more}").spec.fingerprint for more in specs]
    assert len(set(prints)) == len(prints)
    assert model(f"attention:hidden={HIDDEN},heads={HEADS},kdim={HIDDEN},head_dim=8").spec.fingerprint == prints[0]


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ("kv_heads=2", "kv_heads", "must divide heads=3"),
        ("kv_heads=0", "kv_heads", "must be 1 to"),
        ("kv_heads=4", "kv_heads", "must divide"),
        ("heads=5", "hidden", "a multiple of heads, .* or say head_dim="),
        ("head_dim=-1", "head_dim", "must be 1 to"),
        ("kdim=x", "kdim", "must be an integer, got 'x'"),
        ("vdim=1.5", "vdim", "must be an integer"),
        ("bias=yes", "bias", "must be 0 or 1, got 'yes'"),
        ("bias=", "bias", "must be 0 or 1"),
        ("add_bias_kv=2", "add_bias_kv", "must be 0 or 1"),
        ("add_zero_attn=true", "add_zero_attn", "must be 0 or 1"),
        ("rotary=-1", "rotary", "theta as in 10000, or 0"),
        ("rotary=nan", "rotary", "theta as in 10000"),
        ("rotary=inf", "rotary", "theta as in 10000"),
        ("rotary=on", "rotary", "theta as in 10000"),
        ("head_dim=5,rotary=10000", "rotary", "head_dim must be even, got 5"),
        ("max_length=0", "max_length", "must be 1 to"),
        ("seed=a", "seed", "must be an integer"),
        ("dtype=int8", "dtype", "must be one of"),
        ("add_bias=1", "model", "'add_bias=1' is not one of hidden=, heads=, kv_heads="),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: str, field: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        model(f"attention:hidden={HIDDEN},heads={HEADS},{options}")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bias=0", r"k_proj.bias must be absent by the other options, .* has \(24,\)"),
        ("add_bias_kv=1", r"bias_k must be \(24,\) by the other options, .* has nothing"),
        ("kdim=5", r"k_proj.weight must be \(24, 5\)"),
        ("kv_heads=1", r"k_proj.bias must be \(8,\)"),
    ],
)
def test_a_file_that_does_not_fit_the_options_is_refused_by_name(directory: Path, options: str, message: str) -> None:
    path = write(directory, torch.nn.MultiheadAttention(HIDDEN, HEADS).state_dict())
    with pytest.raises(InvalidInput, match=message) as caught:
        model(f"attention:hidden={HIDDEN},heads={HEADS},weights={path},{options}")
    assert caught.value.field == "weights"
