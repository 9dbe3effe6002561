"""The native kernels' linears: the weights' layouts; those of 8-bit integers to the bit against plain numpy, the others
against float64; decoders of every family against transformers' own, and to the bit however they are computed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.cpu import CpuBackend
from engine.batch import Want
from engine.checkpoints.weights import Checkpoint
from engine.errors import InvalidInput
from engine.layers import Linear, use_kernels
from engine.models import build
from engine.models.base import LoadOptions
from engine.models.build import load_decoder
from engine.packing import CHUNK, Arena, pack_int8, pack_plain, unpack_int8
from engine.runner import ModelRunner
from tests.engine.models import CACHE, FAMILIES, Served, backend, reference_logits, reference_model
from tests.engine.test_decoder import words
from tests.pace import slow_but

CPU = CpuBackend(CACHE)
ISAS: list[str] = torch.ops.keypast.isas()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUP, LARGEST = 32, np.float32(32767)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), torch.ops.keypast.isa()
    yield
    torch.set_num_threads(threads)
    torch.ops.keypast.force_isa(isa)


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """Rows of very different scales, an empty group in the first, and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= 10.0 ** torch.randint(-3, 3, (out_features, 1), generator=generator)
    weight[0, :GROUP] = 0
    weight[out_features // 2] = 0
    return weight


# ---- the weights ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 96), (1, 1), (33, 31), (5, 33), (4200, 40)])
def test_a_weight_is_off_by_half_a_step_of_its_group(out_features: int, in_features: int, dtype: torch.dtype) -> None:
    weight = random_weight(out_features, in_features).to(dtype)
    packed = pack_int8(weight)
    assert packed.dtype == torch.int8
    assert packed.shape == (-(-out_features // 32), -(-in_features // 32), 32 * 2 + 32 * 32)
    back = unpack_int8(packed, out_features, in_features)
    for start in range(0, in_features, GROUP):
        group = weight[:, start : start + GROUP].double()
        step = group.abs().amax(-1, keepdim=True) / 127
        error = (back[:, start : start + GROUP].double() - group).abs()
        assert (error <= step * (0.5 + 2**-7)).all()  # scales are rounded up to bfloat16's 8 bits


def test_the_layout_is_the_one_that_is_documented() -> None:
    weight = random_weight(70, 100)
    packed, back = pack_int8(weight), unpack_int8(pack_int8(weight), 70, 100)
    for output, column in [(0, 0), (1, 1), (15, 31), (16, 32), (31, 63), (32, 64), (47, 95), (69, 99)]:
        body = packed[output // 32, column // 32]
        scale = float(body[: 2 * 32].view(torch.bfloat16)[output % 32])
        pair = column % 32 // 2
        value = int(body[64 + output % 32 // 16 * 512 + pair * 32 + output % 16 * 2 + column % 2])
        assert back[output, column] == scale * value
    tail = unpack_int8(packed, 96, 128)
    assert not tail[70:].any()
    assert not tail[:, 100:].any()


def test_the_largest_of_a_group_never_overflows() -> None:
    values = torch.linspace(0.5, 2, 4001)[:, None] * torch.tensor([1.0, -1.0])
    packed = pack_int8(values)
    assert packed[..., 64:].min() >= -127
    torch.testing.assert_close(unpack_int8(packed, 4001, 2), values, rtol=2**-7, atol=0)


# ---- one linear ----


def exactly(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The kernel's arithmetic, operation by operation: what it gives on every instruction set, to the bit."""
    packed = pack_int8(weight)
    blocks, groups = packed.shape[:2]
    values = unpack_int8(packed, blocks * 32, groups * 32).numpy()
    scales = (
        packed[..., :64].contiguous().view(torch.bfloat16).float().permute(0, 2, 1).reshape(blocks * 32, groups).numpy()
    )
    rows = np.zeros((len(x), groups * 32), np.float32)
    rows[:, : x.shape[1]] = x.float().numpy()
    total = np.zeros((len(x), blocks * 32), np.float32)
    for group in range(groups):
        part = rows[:, group * 32 : group * 32 + 32]
        largest = np.abs(part).max(-1, keepdims=True)
        factor = np.divide(LARGEST, largest, out=np.zeros_like(largest), where=largest > 1e-30)
        integers = np.rint(part * factor).astype(np.int64)
        step = scales[:, group : group + 1]
        own = np.divide(
            values[:, group * 32 : group * 32 + 32], step, out=np.zeros_like(values[:, :32]), where=step > 0
        )
        sums = (integers @ np.rint(own).astype(np.int64).T).astype(np.float32)
        total = total + sums * step.T * (largest * (np.float32(1) / LARGEST))
    return torch.from_numpy(total[:, : len(bias)] + bias.numpy()).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out: Tensor = torch.ops.keypast.linear(x, pack_int8(weight), bias)
    return out


def test_an_arena_keeps_each_tensor_apart_from_the_others_whatever_their_sizes() -> None:
    arena = Arena()
    sizes = [1, 1000, CHUNK // 4 - 8, CHUNK // 2, CHUNK + 64, 7]
    given_ones = [torch.full((size,), index, dtype=torch.uint8) for index, size in enumerate(sizes)]
    kept = [arena.keep(tensor) for tensor in given_ones]
    assert all(torch.equal(own, tensor) for own, tensor in zip(kept, given_ones, strict=True))
    assert all(own.data_ptr() % 64 == 0 for own in kept)
    pair = torch.arange(6.0).view(2, 3).t()
    kept_pair = arena.keep(pair)
    assert torch.equal(kept_pair, pair)
    assert kept_pair.is_contiguous()


@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 50, 200]),
    out_features=st.sampled_from([1, 15, 16, 17, 31, 32, 33, 64, 100]),
    in_features=st.sampled_from([1, 2, 16, 31, 32, 33, 63, 64, 96, 130]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_a_linear_is_its_own_arithmetic_to_the_bit(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, isa: str, threads: int, seed: int
) -> None:
    torch.ops.keypast.force_isa(isa)
    torch.set_num_threads(threads)
    weight, bias = random_weight(out_features, in_features, seed), torch.randn(out_features)
    x = (torch.randn(rows, in_features) * 10.0 ** torch.randint(-2, 3, (rows, 1))).to(dtype)
    out = linear(x, weight, bias)
    assert out.dtype == dtype
    assert torch.equal(out, exactly(x, weight, bias))
    row = seed % rows
    assert torch.equal(linear(x[row : row + 1], weight, bias), out[row : row + 1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("out_features", "in_features"), [(960, 576), (77, 1000)])
def test_a_linear_is_near_the_product_with_its_weights(isa: str, out_features: int, in_features: int) -> None:
    """Inputs are rounded to 1 / 65534 of their group's largest at most; sums of float32 add less."""
    torch.ops.keypast.force_isa(isa)
    weight, x, bias = random_weight(out_features, in_features), torch.randn(9, in_features), torch.randn(out_features)
    whole = unpack_int8(pack_int8(weight), out_features, in_features).double()
    truth = x.double() @ whole.T + bias
    allowed = 1.1 * x.abs().max() / 65534 * whole.abs().sum(-1) + 1e-5 * truth.abs().amax(0) + 1e-6
    assert ((linear(x, weight, bias).double() - truth).abs() <= allowed).all()


def test_inputs_may_be_strided_and_of_any_axes() -> None:
    weight, bias = random_weight(40, 48), torch.randn(40)
    x = torch.randn(3, 5, 96)[..., ::2]
    expected = linear(x.reshape(15, 48).contiguous(), weight, bias)
    assert torch.equal(linear(x, weight, bias), expected.view(3, 5, 40))
    wide = torch.randn(5, 100)
    assert torch.equal(linear(wide[:, :48], weight, bias), linear(wide[:, :48].contiguous(), weight, bias))
    assert linear(x[:0], weight, bias).shape == (0, 5, 40)


@pytest.mark.parametrize("isa", ISAS)
def test_a_fault_stays_in_its_row_and_shows_in_all_of_it(isa: str) -> None:
    torch.ops.keypast.force_isa(isa)
    weight, bias, x = random_weight(40, 70), torch.randn(40), torch.randn(20, 70)
    clean = linear(x, weight, bias)
    for row, (column, fault) in {2: (0, float("nan")), 9: (69, float("inf")), 13: (33, -float("inf"))}.items():
        x[row, column] = fault
    out = linear(x, weight, bias)
    assert out[[2, 9, 13]].isnan().all()
    rest = [row for row in range(20) if row not in (2, 9, 13)]
    assert torch.equal(out[rest], clean[rest])


def test_inputs_too_small_to_invert_count_as_zeros() -> None:
    weight, bias = random_weight(8, 32), torch.randn(8)
    for value in (0.0, 1e-45, 1e-31):
        assert torch.equal(linear(torch.full((1, 32), value), weight, bias), bias[None])
    assert not torch.equal(linear(torch.full((1, 32), 1e-20), weight, bias * 0), torch.zeros(1, 8))


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out: Tensor = torch.ops.keypast.linear(x, pack_plain(weight), bias)
    return out


@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 5, 6, 7, 10, 11, 12, 13, 24, 25, 50, 200]),
    out_features=st.sampled_from([1, 15, 16, 17, 31, 32, 33, 64, 100]),
    in_features=st.sampled_from([1, 2, 16, 31, 32, 33, 63, 64, 96, 130]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_a_plain_linear_is_the_product_and_a_row_depends_on_no_other(
    rows: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    isa: str,
    threads: int,
    seed: int,
) -> None:
    torch.ops.keypast.force_isa(isa)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    weight, bias = torch.randn(out_features, in_features).to(stored), torch.randn(out_features)
    x = torch.randn(rows, in_features).to(dtype)
    out = plain_linear(x, weight, bias)
    assert out.dtype == dtype
    # Against bfloat16 weights inputs may be rounded to bfloat16; the rest is float32's and the output's own rounding.
    inputs = 2**-8 if stored == torch.bfloat16 and dtype != torch.bfloat16 else 0
    truth = x.double() @ weight.double().T + bias
    allowed = (inputs + in_features * 2**-23) * (x.double().abs() @ weight.double().abs().T + bias.abs())
    allowed += torch.finfo(dtype).eps * (truth.abs() + allowed) + 1e-7
    assert ((out.double() - truth).abs() <= allowed).all()
    row = seed % rows
    assert torch.equal(plain_linear(x[row : row + 1], weight, bias), out[row : row + 1])


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_fault_stays_in_its_row_of_a_plain_linear(isa: str, stored: torch.dtype) -> None:
    torch.ops.keypast.force_isa(isa)
    weight, bias, x = torch.randn(40, 70).to(stored), torch.randn(40), torch.randn(20, 70)
    clean = plain_linear(x, weight, bias)
    x[9, 3] = float("nan")
    out = plain_linear(x, weight, bias)
    assert out[9].isnan().all()
    rest = [row for row in range(20) if row != 9]
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, b: (p[:1], b), r"of 48 inputs and 40 outputs must be contiguous \[2, 2, 1088\]"),
        (lambda p, b: (p[:, :1], b), "must be contiguous"),
        (lambda p, b: (p.float(), b), r"must be contiguous \[2, 2, 1024\]"),
        (lambda p, b: (p.double(), b), "must be float16, bfloat16 or float32"),
        (lambda p, b: (p.transpose(0, 1), b), "must be contiguous"),
        (lambda p, b: (p, b.double()), "bias must be float32"),
        (lambda p, b: (p, b.repeat(2)), "must be contiguous"),
    ],
)
def test_refuses_weights_of_another_form(change: Callable[[Tensor, Tensor], Any], message: str) -> None:
    packed, bias = change(pack_int8(random_weight(40, 48)), torch.zeros(40))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.keypast.linear(torch.randn(1, 48), packed, bias)


def test_the_operator_traces_and_matches_its_schema() -> None:
    packed = pack_int8(random_weight(40, 48))
    for shape in ((48,), (3, 48), (2, 3, 48)):
        torch.library.opcheck(torch.ops.keypast.linear.default, (torch.randn(shape), packed, torch.randn(40)))


# ---- decoders ----


def rounded(linear: Any) -> None:
    """Replaces the weight of one of transformers' linears by what its 8 bits stand for."""
    own = linear.weight.detach()
    across = own.T if type(linear).__name__ == "Conv1D" else own
    back = unpack_int8(pack_int8(across), *across.shape)
    linear.weight = torch.nn.Parameter(back.T.contiguous() if across is not own else back)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """The saved model, and an oracle with its linears rounded, the head of a tied one apart from the embedding."""
    saved = {}
    for family in FAMILIES:
        path = tmp_path_factory.mktemp(family)
        model = reference_model(family)
        model.save_pretrained(path)
        for module in list(model.modules()):
            if type(module).__name__ in ("Linear", "Conv1D"):
                rounded(module)
        saved[family] = (model, path)
    return saved


class OneByOne(CpuBackend):
    """Runs a decoder's blocks operator by operator."""

    def decoder_blocks(self, *_: Any) -> None:
        return None


def serve(
    path: Path,
    dtype: torch.dtype = torch.float32,
    kv_dtype: str = "float32",
    kernels: Any = CPU,
    token_budget: int = 512,
    int8: bool = True,
) -> Served:
    checkpoint = Checkpoint.open(path)
    model = load_decoder("tiny", checkpoint, device="cpu", dtype=dtype, kv_dtype=kv_dtype, kernels=True, int8=int8)
    return Served(ModelRunner(model, kernels, 200, 16), token_budget)


@pytest.mark.parametrize("kernels", ["cpu", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_are_those_of_the_rounded_weights(
    family: str, kernels: str, checkpoints: dict[str, tuple[Any, Path]]
) -> None:
    oracle, path = checkpoints[family]
    served = serve(path, kernels=backend(kernels), token_budget=50)
    tokens = words(100)
    session = served.open()
    logits = [served.logits(session, tokens[:90])]
    logits += [served.logits(session, [token]) for token in tokens[90:]]
    torch.testing.assert_close(torch.cat(logits), reference_logits(oracle, tokens), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_as_near_as_without_8_bits(
    family: str, dtype: torch.dtype, checkpoints: dict[str, tuple[Any, Path]]
) -> None:
    oracle, path = checkpoints[family]
    tokens = words(80)
    expected = reference_logits(oracle, tokens)
    served = serve(path, dtype, "float16")
    error = (served.logits(served.open(), tokens) - expected).abs().max()
    assert error < {torch.bfloat16: 0.05, torch.float16: 0.006}[dtype] * (expected.max() - expected.min())


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", slow_but(DTYPES, {torch.bfloat16}))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_position_has_the_same_bits_however_it_is_computed(
    family: str, dtype: torch.dtype, int8: bool, checkpoints: dict[str, tuple[Any, Path]]
) -> None:
    """Prefilled whole, in chunks or step by step, alone or in company, on one thread or more, in one call or one
    operator after another."""
    served = serve(checkpoints[family][1], dtype, "float16", token_budget=300, int8=int8)
    tokens = words(45)
    whole = served.logits(served.open(), tokens)
    for split in (1, 7, 16, 44):
        session = served.open()
        parts = [served.logits(session, tokens[:split])]
        parts += [served.logits(session, [token]) for token in tokens[split:]]
        assert torch.equal(torch.cat(parts), whole)
    rows = [words(length, seed=length) for length in (45, 3, 17, 1, 30, 45, 12)]
    rows[5] = tokens
    batch = served.open(batch_size=len(rows))
    padded = [row + [0] * (45 - len(row)) for row in rows]
    given = served.tokens(batch, *padded, batch_valid_length=[len(row) for row in rows], want=Want(logits="all"))
    assert torch.equal(torch.from_numpy(given.outputs["logits"][5]), whole)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(served.logits(served.open(), tokens), whole)
    apart = serve(checkpoints[family][1], dtype, "float16", OneByOne(CACHE), int8=int8)
    assert torch.equal(apart.logits(apart.open(), tokens), whole)


@pytest.mark.parametrize("isa", ISAS)
def test_one_call_on_every_instruction_set(isa: str, checkpoints: dict[str, tuple[Any, Path]]) -> None:
    torch.ops.keypast.force_isa(isa)
    for family in ("llama-tied-biased", "qwen3"):
        oracle, path = checkpoints[family]
        served = serve(path)
        tokens = words(50)
        expected = reference_logits(oracle, tokens)
        torch.testing.assert_close(served.logits(served.open(), tokens), expected, atol=2e-3, rtol=0)


def test_nothing_but_the_integers_is_kept(checkpoints: dict[str, tuple[Any, Path]]) -> None:
    checkpoint = Checkpoint.open(checkpoints["llama"][1])
    model = load_decoder(
        "tiny", checkpoint, device="cpu", dtype=torch.bfloat16, kv_dtype="float16", kernels=True, int8=True
    )
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    kept = [module for module in linears if module.packed is not None]
    assert len(kept) == 3 * 4 + 1
    for module in kept:
        assert module.packed is not None
        assert module.packed.nbytes == -(-module.out_features // 32) * -(-module.in_features // 32) * 1088
    assert sum(module.weight.numel() for module in linears) == 0


# ---- who may ask for it ----


def test_a_decoder_is_asked_for_by_its_options(checkpoints: dict[str, tuple[Any, Path]]) -> None:
    path = str(checkpoints["llama"][1])
    plain, eight = (
        build("tiny", path, LoadOptions(CACHE, "float32", "float32", quantize=quantize, kernels=True), print).model
        for quantize in ("none", "int8")
    )
    assert not any(module.int8 for module in plain.modules() if isinstance(module, Linear))  # type: ignore[attr-defined]
    served, expected = (Served(ModelRunner(model, CPU, 50, 16)) for model in (eight, plain))
    difference = served.logits(served.open(), words(20)) - expected.logits(expected.open(), words(20))
    assert 0 < difference.abs().max() < 0.2


def test_an_attention_layer_stays_as_it_is() -> None:
    layer = build(
        "layer", "attention:hidden=32,heads=2", LoadOptions(CACHE, quantize="int8", kernels=True), print
    ).model
    assert not any(module.int8 for module in layer.modules() if isinstance(module, Linear))  # type: ignore[attr-defined]


def test_a_layer_that_is_not_packed_is_not_rounded() -> None:
    linear = Linear(48, 33)
    x = torch.randn(2, 48)
    expected = linear(x)
    use_kernels(linear, int8=True)
    assert torch.equal(linear(x), expected)
    linear.pack()
    assert 0 < (linear(x) - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "must be one of none, int8, got 'int4'"),
        ({"quantize": "int8", "device": "cuda"}, "int8 is for the CPU, not for cuda: say none, or device cpu"),
    ],
)
def test_other_ways_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        LoadOptions(CACHE, **options).resolve()
    assert refused.value.field == "quantize"
    assert message in str(refused.value)


def test_without_the_kernels_it_says_so(checkpoints: dict[str, tuple[Any, Path]]) -> None:
    with pytest.raises(InvalidInput, match="int8 needs the native kernels, else say none") as refused:
        build("tiny", str(checkpoints["llama"][1]), LoadOptions(CACHE, quantize="int8"), print)
    assert refused.value.field == "quantize"
