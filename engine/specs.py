"""What a model is to the rest of the engine: data, never code. Dtypes are names ("float16")."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Axis = Literal["n", "m"]  # n positions that ask, m positions that are asked: keys and values

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_NUMPY = {"float32": "float32", "float16": "float16", "bfloat16": "float32"}  # numpy has no bfloat16: it is widened


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named input or output. Its shape is (B, `axis`) + `trailing`; an int fixes an axis, a str names it.
    `required`: wherever another input of its axis is given; an append brings the inputs of one axis at least.
    `values`: the lowest and highest that an input's elements may have."""

    name: str
    dtypes: tuple[str, ...]
    trailing: tuple[int | str, ...] = ()
    required: bool = True
    axis: Axis = "n"
    values: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The shape of one position's keys and values, all layers: what sizes a pool."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "float16"

    @property
    def position_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)  # without slots: what every step asks for is worked out once
class ModelSpec:
    """A loaded model as its callers see it.

    `causal`: position i attends to [0, i]; when False the caller's attention_mask is the whole truth.
    `appends`: the axis of the inputs whose positions join the past. Where that is not the axis that asks ("n"), an
    append may bring either or both, in any numbers. `aligned`: each query stands at the position that is appended with
    it (rotary tables turn both), so there are as many of both.
    `history`: the int input whose values the session keeps (so that a position can be replayed), or None.
    """

    name: str
    kind: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kv: KVSpec
    causal: bool
    max_length: int
    dtype: str
    device: str
    fingerprint: str
    appends: Axis = "n"
    aligned: bool = False
    history: str | None = None
    vocab_size: int | None = None

    @cached_property
    def input_names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.inputs)

    @cached_property
    def output_names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.outputs)

    def past_tensors(self, rows: int, slots: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Numpy dtype and shape of each array of a past off the device, by name, in MindSpore's layout."""
        kv = self.kv
        dtype = _NUMPY[kv.dtype]
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for layer in range(kv.layers):
            tensors[f"key_past.{layer}"] = (dtype, (rows, kv.kv_heads, kv.head_dim, slots))
            tensors[f"value_past.{layer}"] = (dtype, (rows, kv.kv_heads, slots, kv.head_dim))
        if self.history is not None:
            tensors[self.history] = ("int64", (rows, slots))
        return tensors
