"""The option space of torch.nn.MultiheadAttention as hypothesis draws it, and what torch gives for a drawn case."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class Case:
    """One constructor and one call. `batch` None: unbatched. `masks`: the type of both, "" for none."""

    options: dict[str, Any]
    batch: int | None
    n: int
    keys: int
    masks: str
    mask_rank: int
    padding: bool
    is_causal: bool
    need_weights: bool
    average: bool
    training: bool
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.options["dtype"]
        return dtype

    @property
    def heads(self) -> int:
        heads: int = self.options["num_heads"]
        return heads

    @property
    def call(self) -> dict[str, Any]:
        return {"need_weights": self.need_weights, "average_attn_weights": self.average, "is_causal": self.is_causal}

    def layer(self) -> torch.nn.MultiheadAttention:
        torch.manual_seed(self.seed)
        layer = torch.nn.MultiheadAttention(**self.options)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0, 0.4)
        return layer.train(self.training)

    def tensors(self) -> dict[str, Tensor]:
        """query, key, value and the masks, in torch's shapes; a query sees its first key at least."""
        generator = torch.Generator().manual_seed(self.seed)
        size = self.options["embed_dim"]
        widths = {"query": size, "key": self.options["kdim"] or size, "value": self.options["vdim"] or size}
        found = {}
        for name, width in widths.items():
            positions = self.n if name == "query" else self.keys
            x = torch.randn(self.batch or 1, positions, width, generator=generator, dtype=self.dtype)
            found[name] = x[0] if self.batch is None else x if self.options["batch_first"] else x.transpose(0, 1)
        if self.masks:
            leading = () if self.mask_rank == 2 else ((self.batch or 1) * self.heads,)
            found["attn_mask"] = self._mask((*leading, self.n, self.keys), generator)
            if self.padding:
                leading = () if self.batch is None else (self.batch,)
                found["key_padding_mask"] = self._mask((*leading, self.keys), generator)
        if self.is_causal:
            found["attn_mask"] = torch.ones(self.n, self.keys, dtype=torch.bool).triu(1)
        for tensor in found.values():
            if tensor.is_floating_point():
                tensor.requires_grad_()
        return {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in found.items()}

    def _mask(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        hidden = torch.rand(shape, generator=generator) < 0.4
        hidden[..., 0] = False
        if self.masks == "bool":
            return hidden
        return torch.randn(shape, generator=generator, dtype=self.dtype).masked_fill(hidden, -torch.inf)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    head_dim, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    masks = draw(st.sampled_from(["", "bool", "float"]))
    extra = {name: draw(st.booleans()) for name in ("add_bias_kv", "add_zero_attn")}
    is_causal = not masks and draw(st.booleans())
    # With is_causal and no weights torch's kernel counts the extra keys as positions and hides them.
    need_weights = draw(st.booleans()) or (is_causal and any(extra.values()))
    options = {
        "embed_dim": heads * head_dim,
        "num_heads": heads,
        "bias": draw(st.booleans()),
        **extra,
        "kdim": draw(st.sampled_from([None, 5])),
        "vdim": draw(st.sampled_from([None, 3])),
        "batch_first": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }
    return Case(
        options,
        batch=draw(st.sampled_from([None, 1, 2, 3])),
        n=draw(st.integers(1, 5)),
        keys=draw(st.integers(1, 6)),
        masks=masks,
        mask_rank=draw(st.sampled_from([2, 3])),
        padding=draw(st.booleans()),
        is_causal=is_causal,
        need_weights=need_weights,
        average=draw(st.booleans()),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def gradients(outputs: list[Tensor | None], by: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a fixed mixture of all outputs, by every tensor that wants one and is used."""
    mixture = torch.zeros((), dtype=torch.float64)
    for shift, output in enumerate(outputs):
        if output is not None:
            weights = torch.cos(torch.arange(output.numel(), dtype=torch.float64) + shift).view(output.shape)
            mixture = mixture + (output.double() * weights).sum()
    wanted = {name: tensor for name, tensor in by.items() if tensor.requires_grad}
    found = torch.autograd.grad(mixture, list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(wanted[name]) if g is None else g for name, g in zip(wanted, found, strict=True)}


def assert_all_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        close = torch.allclose(got[name], tensor, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert close, f"{name} differs by {(got[name] - tensor).abs().max()}"


def splits(total: int) -> st.SearchStrategy[list[slice]]:
    """Any way to cut [0, total) into chunks, in order."""
    cuts = st.sets(st.integers(1, max(1, total - 1)), max_size=total - 1)
    return cuts.map(
        lambda at: [slice(a, b) for a, b in itertools.pairwise([0, *sorted(c for c in at if c < total), total])]
    )
