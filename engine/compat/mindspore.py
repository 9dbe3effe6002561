"""`mindspore.parallel.nn.MultiHeadAttention` of release 1.5, on torch tensors and torch's dtypes.

Constructor, checks, parameters, call and results are the original's; the arithmetic is the core's. What differs:

* `batch_valid_length` is the truth. In later iterations it counts the new token, which goes to slot
  batch_valid_length - 1 and sees the slots before it. The original ignores it there and counts the non-zero elements of
  key_past[b, 0, 0, :]; it gives other numbers where that channel of a valid key is exactly 0, and where a caller passes
  the prompt's length again and again.
* A full cache raises LengthExceeded; the original loses the token in silence. The pasts are never written to.
* A step's key and value replace what its slot holds; slots from the new length on get probability exactly 0.
* q is scaled before the product, which is summed in float32: large scores do not become NaN.
* compute_dtype float32 works, as it does from 1.10 on; the original's 1.5 raises a TypeError at the first matmul.

`release="1.10"` gives that release's call: attn_out comes in the query's dtype instead of compute_dtype.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import layers
from engine.attention.dense import DenseView, Past
from engine.attention.mask import additive
from engine.compat.convert import from_mindspore
from engine.errors import LengthExceeded
from engine.parallel import Parallel

RELEASES = ("1.5", "1.10")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, got {value}")


class OpParallelConfig:
    """How many ways the batch (`data_parallel`) and the heads (`model_parallel`) are cut.

    Raises TypeError for what is not an int, ValueError for an int below 1; also when they are set later.
    """

    def __init__(self, data_parallel: int = 1, model_parallel: int = 1) -> None:
        self.data_parallel = data_parallel
        self.model_parallel = model_parallel

    def __repr__(self) -> str:
        return f"OpParallelConfig(data_parallel={self.data_parallel}, model_parallel={self.model_parallel})"

    @property
    def data_parallel(self) -> int:
        return self._data_parallel

    @data_parallel.setter
    def data_parallel(self, value: int) -> None:
        _check_positive("data_parallel", value)
        self._data_parallel = value

    @property
    def model_parallel(self) -> int:
        return self._model_parallel

    @model_parallel.setter
    def model_parallel(self, value: int) -> None:
        _check_positive("model_parallel", value)
        self._model_parallel = value


def add_flags_recursive(module: nn.Module, **flags: object) -> None:
    """Sets attributes on `module` and all below it, as in add_flags_recursive(model, is_first_iteration=False)."""
    for each in module.modules():
        for name, value in flags.items():
            setattr(each, name, value)


class Cell(nn.Module):
    """torch's Module with the methods of MindSpore's that callers of the layer use; a base for the modules around it,
    too. Starts outside training."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def set_train(self, mode: bool = True) -> Self:
        return self.train(mode)

    def add_flags_recursive(self, **flags: object) -> Self:
        add_flags_recursive(self, **flags)
        return self

    def parameters_and_names(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter), in the original's order."""
        return self.named_parameters()


class Projection(layers.Linear):
    """y = x W + b: MindSpore stores this one weight as [in, out]."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.T


class MultiHeadAttention(Cell):
    """The original's class; B batch_size, S src_seq_length, T tgt_seq_length, H hidden_size, N num_heads, d = H / N.

    Dtypes are torch.float16 or torch.float32. Dropout rates are floats in [0, 1): of the output, and of the
    probabilities; they act after set_train(True). Parameters, all of param_init_type, weights Normal(0, 0.01) and
    biases zero: projection.weight (H, H) as [in, out], projection.bias; dense1 (query), dense2 (key) and dense3
    (value), .weight (H, H) as [out, in], .bias.

    `is_first_iteration`, with use_past: True for the call with the prompt, padded to S; False for the steps after it.
    Set it here, or with add_flags_recursive on any module above.

    parallel_config: N must be a multiple of its model_parallel. The rest of it counts where torch.distributed is
    initialised: B must be a multiple of data_parallel, and the cuts a divisor of the ranks. Every rank then calls the
    layer with the whole batch and gets the whole result, as the original's callers do; in between it computes its share
    of the rows, with its share of the heads. Parameters and their gradients are whole on every rank.

    Raises TypeError and ValueError as the original.
    """

    _core: layers.MultiHeadAttention

    def __init__(
        self,
        batch_size: int,
        src_seq_length: int,
        tgt_seq_length: int,
        hidden_size: int,
        num_heads: int,
        hidden_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.1,
        compute_dtype: torch.dtype = torch.float16,
        softmax_compute_type: torch.dtype = torch.float32,
        param_init_type: torch.dtype = torch.float32,
        use_past: bool = False,
        parallel_config: OpParallelConfig = OpParallelConfig(),
        *,
        release: str = "1.5",
    ) -> None:
        super().__init__()
        _check_sizes(batch_size, src_seq_length, tgt_seq_length, hidden_size, num_heads)
        _check_rate("hidden_dropout_rate", hidden_dropout_rate)
        _check_rate("attention_dropout_rate", attention_dropout_rate)
        _check_float("compute_dtype", compute_dtype)
        _check_float("softmax_compute_type", softmax_compute_type)
        _check_float("param_init_type", param_init_type)
        if not isinstance(use_past, bool):
            raise TypeError(f"use_past: must be a bool, got {use_past!r}")
        _check_parallel(parallel_config, batch_size, num_heads)
        if release not in RELEASES:
            raise ValueError(f"release: must be one of {', '.join(RELEASES)}, got {release!r}")

        self.batch_size, self.hidden_size, self.num_heads = batch_size, hidden_size, num_heads
        self.src_seq_length, self.tgt_seq_length = src_seq_length, tgt_seq_length
        self.use_past, self.is_first_iteration, self.release = use_past, True, release
        self.parallel_config = parallel_config
        core = layers.MultiHeadAttention(
            hidden_size,
            num_heads,
            attention_dropout=attention_dropout_rate,
            output_dropout=hidden_dropout_rate,
            compute_dtype=compute_dtype,
            softmax_dtype=softmax_compute_type,
        )
        core.o_proj = Projection(hidden_size, hidden_size)
        core.to(param_init_type)
        # The core's linears under the original's names, in its order; the core itself is no submodule, so that
        # parameters have one name each.
        self.__dict__["_core"] = core
        self.projection, self.dense1, self.dense2, self.dense3 = core.o_proj, core.q_proj, core.k_proj, core.v_proj
        for linear in (self.projection, self.dense1, self.dense2, self.dense3):
            nn.init.normal_(linear.weight, 0.0, 0.01)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query_tensor: Tensor,
        key_tensor: Tensor,
        value_tensor: Tensor,
        attention_mask: Tensor,
        key_past: Tensor | None = None,
        value_past: Tensor | None = None,
        batch_valid_length: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(attn_out, (key_present (B, N, d, T), value_present (B, N, T, d))); attn_out has the query's shape.

        query_tensor (B, S, H) or (B * S, H), key_tensor and value_tensor (B, T, H) or (B * T, H), each float32 or
        float16; in later iterations S and T of these are 1. attention_mask (B, S, T), float32 or float16, 1 = attend;
        in later iterations (B, 1, T), and not used.

        With use_past S = T, and all three are required: key_past (B, N, d, T) and value_past (B, N, T, d), float16,
        in the first iteration not used; batch_valid_length (B,), int32, the lengths after the call.

        Raises ValueError for a wrong shape, TypeError for a wrong dtype and for what is missing or too much,
        LengthExceeded where the cache is full.
        """
        step = self.use_past and not self.is_first_iteration
        self._check_inputs(query_tensor, key_tensor, value_tensor, attention_mask, step)
        past = self._check_past(key_past, value_past, batch_valid_length)
        if step and past is not None:
            _check_room(past.length, self.tgt_seq_length)
            bias, new, past = None, None, past._replace(length=past.length - 1)
        else:
            bias = additive(attention_mask, self._core.softmax_dtype)[:, None]
            new, past = None if past is None else past.length, None
        shape = self.batch_size, -1, self.hidden_size
        query, key, value = (tensor.reshape(shape) for tensor in (query_tensor, key_tensor, value_tensor))
        parallel = self._parallel()
        if parallel is None:
            out, present = _attend(self._lent_core(), query, key, value, bias, past, new)
        else:
            out, present = self._attend_cut(parallel, query, key, value, bias, past, new)
        out = out.reshape(query_tensor.shape)
        out = out.to(query_tensor.dtype) if self.release == "1.10" else out
        return out, (present.key, present.value)

    def _parallel(self) -> Parallel | None:
        """The grid of ranks that this call is cut over, or None: it is not."""
        config = self.parallel_config
        if config.data_parallel * config.model_parallel == 1 or not _is_distributed():
            return None
        _check_parallel(config, self.batch_size, self.num_heads)
        return _grid(config.data_parallel, config.model_parallel, dist.group.WORLD)

    def _attend_cut(
        self,
        parallel: Parallel,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        past: Past | None,
        new: Tensor | None,
    ) -> tuple[Tensor, Past]:
        """This rank's rows, with its heads, then everyone's results side by side. The core is made for the call."""
        data, model = parallel.data, parallel.model
        with torch.device("meta"):
            core = layers.MultiHeadAttention(self.hidden_size, self.num_heads)
            core.shard(parallel)
        lent = self._lent_core()
        core.compute_dtype, core.softmax_dtype, core.training = lent.compute_dtype, lent.softmax_dtype, lent.training
        core.attention_dropout, core.output_dropout = lent.attention_dropout, lent.output_dropout
        whole = from_mindspore(dict(self.named_parameters()))
        weights = {name: model.split_like(data.copy(whole[name]), own.shape) for name, own in core.named_parameters()}
        query, key, value = (data.split(tensor, 0) for tensor in (query, key, value))
        if bias is not None:
            bias = data.share(bias, 0)
        if past is not None:
            keys, values = (model.split(data.split(tensor, 0), 1) for tensor in past[:2])
            past = Past(keys, values, data.share(past.length, 0))
        if new is not None:
            new = data.share(new, 0)
        call = partial(torch.func.functional_call, core, weights)
        out, present = _attend(core, query, key, value, bias, past, new, call)
        keys, values = (data.join(model.join(tensor, 1), 0) for tensor in present[:2])
        return data.join(out, 0), Past(keys, values, present.length)

    def _lent_core(self) -> layers.MultiHeadAttention:
        """The core with what this module holds now: train() does not reach it, nor does a linear that is replaced."""
        core = self._core
        core.training = self.training
        core.o_proj, core.q_proj, core.k_proj, core.v_proj = self.projection, self.dense1, self.dense2, self.dense3
        return core

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, step: bool) -> None:
        batch, width = self.batch_size, self.hidden_size
        n, m = (1, 1) if step else (self.src_seq_length, self.tgt_seq_length)
        named = {"query_tensor": query, "key_tensor": key, "value_tensor": value, "attention_mask": mask}
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: must be a tensor, got {type(tensor).__name__}")
        _check_shape("query_tensor", query, (batch, n, width), (batch * n, width))
        _check_shape("key_tensor", key, (batch, m, width), (batch * m, width))
        _check_shape("value_tensor", value, (batch, m, width), (batch * m, width))
        masks = [(batch, n, self.tgt_seq_length)]
        _check_shape("attention_mask", mask, *masks, *([(batch, width)] if step else []))  # the original's own slip
        for name, tensor in named.items():
            _check_dtype(name, tensor, torch.float32, torch.float16)

    def _check_past(self, key: Tensor | None, value: Tensor | None, length: Tensor | None) -> Past | None:
        """The three as one, or None without use_past."""
        named = {"key_past": key, "value_past": value, "batch_valid_length": length}
        for name, tensor in named.items():
            if self.use_past and not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: use_past needs a tensor, got {type(tensor).__name__}")
            if not self.use_past and tensor is not None:
                raise TypeError(f"{name}: must be None, because use_past is False")
        if key is None or value is None or length is None:
            return None
        if self.src_seq_length != self.tgt_seq_length:
            lengths = f"{self.src_seq_length} and {self.tgt_seq_length}"
            raise ValueError(f"use_past: src_seq_length and tgt_seq_length must be equal, got {lengths}")
        batch, heads, slots = self.batch_size, self.num_heads, self.tgt_seq_length
        head_dim = self.hidden_size // heads
        _check_shape("key_past", key, (batch, heads, head_dim, slots))
        _check_shape("value_past", value, (batch, heads, slots, head_dim))
        _check_shape("batch_valid_length", length, (batch,))
        _check_dtype("key_past", key, torch.float16)
        _check_dtype("value_past", value, torch.float16)
        _check_dtype("batch_valid_length", length, torch.int32)
        return Past(key, value, length)


def _check_sizes(batch_size: int, src_seq_length: int, tgt_seq_length: int, hidden_size: int, num_heads: int) -> None:
    _check_positive("batch_size", batch_size)
    _check_positive("src_seq_length", src_seq_length)
    _check_positive("tgt_seq_length", tgt_seq_length)
    _check_positive("hidden_size", hidden_size)
    _check_positive("num_heads", num_heads)
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size: must be a multiple of num_heads, {num_heads}, got {hidden_size}")


def _check_rate(name: str, value: object) -> None:
    if not isinstance(value, float):
        raise TypeError(f"{name}: must be a float, got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: must be at least 0 and below 1, got {value}")


def _check_float(name: str, value: object) -> None:
    if value not in (torch.float32, torch.float16):
        raise TypeError(f"{name}: must be torch.float32 or torch.float16, got {value!r}")


def _check_parallel(config: object, batch_size: int, num_heads: int) -> None:
    """torch.distributed, initialised, stands for the original's parallel modes; alone, the cuts change nothing."""
    if type(config) is not OpParallelConfig:  # a subclass is refused, too
        raise TypeError(f"parallel_config: must be an OpParallelConfig, got {config!r}")
    if num_heads % config.model_parallel:
        raise ValueError(f"num_heads: must be a multiple of model_parallel, {config.model_parallel}, got {num_heads}")
    if not _is_distributed():
        return
    if batch_size % config.data_parallel:
        raise ValueError(f"batch_size: must be a multiple of data_parallel, {config.data_parallel}, got {batch_size}")
    cuts, ranks = config.data_parallel * config.model_parallel, dist.get_world_size()
    if cuts > ranks:
        raise ValueError(f"parallel_config: {config} needs {cuts} ranks, there are {ranks}")
    if ranks % cuts:
        raise ValueError(f"parallel_config: {config} makes {cuts} parts, which do not divide {ranks} ranks")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@cache
def _grid(data_parallel: int, model_parallel: int, world: dist.ProcessGroup) -> Parallel:
    """One for all layers: its groups are made once, which takes every rank of `world`."""
    return Parallel.grid(data_parallel, model_parallel, "cuda" if dist.get_backend(world) == "nccl" else "cpu")


def _attend(
    core: layers.MultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    past: Past | None,
    new: Tensor | None,
    call: Callable[[tuple[Tensor, Tensor, Tensor, DenseView]], Tensor] | None = None,
) -> tuple[Tensor, Past]:
    """`call`: runs the core, where it is not run over its own parameters."""
    if past is not None:
        # In compute_dtype before the new token is added: that one is rounded no further than the products are.
        past = Past(past.key.to(core.compute_dtype), past.value.to(core.compute_dtype), past.length)
    view = DenseView(bias=bias, past=past, new=new)
    out = core(query, key, value, view) if call is None else call((query, key, value, view))
    assert view.present is not None  # the call has set it
    return out, view.present


def _check_shape(name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in allowed:
        raise ValueError(f"{name}: must have shape {' or '.join(map(str, allowed))}, got {tuple(tensor.shape)}")


def _check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: must be {' or '.join(map(str, allowed))}, got {tensor.dtype}")


def _check_room(length: Tensor, slots: int) -> None:
    if torch.compiler.is_compiling():
        return  # lengths are read on the host
    lengths = length.tolist()
    if min(lengths) < 1:
        raise ValueError(f"batch_valid_length: counts the new token, so each must be at least 1, got {lengths}")
    if max(lengths) > slots:
        raise LengthExceeded("batch_valid_length", f"the cache has {slots} slots, got {lengths}")
