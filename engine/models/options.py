"""The options of `attention:`: the text after NAME= as checked values."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from engine.errors import InvalidInput

_DEFAULTS = {
    "hidden": "512",
    "heads": "8",
    "kv_heads": "",
    "head_dim": "",
    "kdim": "",
    "vdim": "",
    "bias": "1",
    "add_bias_kv": "0",
    "add_zero_attn": "0",
    "rotary": "0",
    "weights": "",
    "seed": "0",
    "max_length": "32768",
    "dtype": "auto",
}
_LARGEST = 2**24


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """`rotary` is theta, 0: no rotation. `weights` None: drawn from the seed. `dtype` "auto": the device decides."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    kdim: int
    vdim: int
    bias: bool
    add_bias_kv: bool
    add_zero_attn: bool
    rotary: float
    weights: Path | None
    seed: int
    max_length: int
    dtype: str

    @classmethod
    def parse(cls, spec: str) -> Self:
        """`attention[:OPTION=VALUE,...]`. Raises InvalidInput naming the option."""
        given = dict(_DEFAULTS)
        for part in filter(None, spec.partition(":")[2].split(",")):
            key, equals, value = part.partition("=")
            if key not in given or not equals:
                raise InvalidInput("model", f"{part!r} is not one of {', '.join(f'{name}=' for name in given)}")
            given[key] = value
        hidden, heads = _size(given, "hidden"), _size(given, "heads")
        kv_heads = _size(given, "kv_heads", heads)
        if heads % kv_heads:
            raise InvalidInput("kv_heads", f"must divide heads={heads}, got {kv_heads}")
        if not given["head_dim"] and hidden % heads:
            raise InvalidInput("hidden", f"must be a multiple of heads, got {hidden} and {heads}; or say head_dim=")
        head_dim = _size(given, "head_dim", hidden // heads)
        rotary = _theta(given, "rotary")
        if rotary and head_dim % 2:
            raise InvalidInput("rotary", f"turns pairs of channels: head_dim must be even, got {head_dim}")
        return cls(
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            kdim=_size(given, "kdim", hidden),
            vdim=_size(given, "vdim", hidden),
            bias=_switch(given, "bias"),
            add_bias_kv=_switch(given, "add_bias_kv"),
            add_zero_attn=_switch(given, "add_zero_attn"),
            rotary=rotary,
            weights=Path(given["weights"]).expanduser() if given["weights"] else None,
            seed=_integer(given, "seed"),
            max_length=_size(given, "max_length"),
            dtype=given["dtype"],
        )


def _integer(given: dict[str, str], key: str) -> int:
    try:
        return int(given[key])
    except ValueError:
        raise InvalidInput(key, f"must be an integer, got {given[key]!r}") from None


def _size(given: dict[str, str], key: str, default: int = 0) -> int:
    value = _integer(given, key) if given[key] else default
    if not 1 <= value <= _LARGEST:
        raise InvalidInput(key, f"must be 1 to {_LARGEST}, got {value}")
    return value


def _switch(given: dict[str, str], key: str) -> bool:
    if given[key] not in ("0", "1"):
        raise InvalidInput(key, f"must be 0 or 1, got {given[key]!r}")
    return given[key] == "1"


def _theta(given: dict[str, str], key: str) -> float:
    try:
        value = float(given[key])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InvalidInput(key, f"must be theta as in 10000, or 0 for no rotation, got {given[key]!r}")
    return value
