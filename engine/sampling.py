"""Drawing the next token. Each row's draw depends on its own logits, settings and (seed, row, position) alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Sample
from engine.upload import to_device

SPREAD = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: neighbouring (seed, row, position) give unrelated streams
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # splitmix64's shifts and factors
TOGETHER = 32  # rows that are drawn at once: what is made on the way is ten times their logits
CANDIDATES = 1024  # top_p looks at so many first: sorting a whole vocabulary takes milliseconds


def draw(
    logits: Tensor, samples: Sequence[Sample], histories: Sequence[Tensor | None], keys: Sequence[tuple[int, int]]
) -> Tensor:
    """Token ids (R,) int64 from logits (R, V) float32; `histories`, ids so far, if penalised; `keys`, (row, at)."""
    if all(sample.temperature == 0 and sample.repetition_penalty == 1 for sample in samples):
        return _argmax(logits)
    if logits.device.type != "cpu":
        return draw_together(logits, samples, histories, keys)
    rows = zip(logits, samples, histories, keys, strict=True)
    return torch.stack([_draw_one(row, sample, history, key) for row, sample, history, key in rows])


def draw_together(
    logits: Tensor, samples: Sequence[Sample], histories: Sequence[Tensor | None], keys: Sequence[tuple[int, int]]
) -> Tensor:
    """`draw` for a device that is slow at small things: all rows at once, nothing read on the host, and noise that is
    made where the logits are. The same odds, other draws."""
    if any(history is not None for history in histories):
        rows = zip(logits, samples, histories, strict=True)
        logits = torch.stack([x if seen is None else _penalise(x, seen, s.repetition_penalty) for x, s, seen in rows])
    settings = torch.tensor([(s.temperature, s.top_k, s.top_p, s.min_p) for s in samples], dtype=torch.float32)
    mixed = torch.tensor([_mix(sample.seed, *key) for sample, key in zip(samples, keys, strict=True)])
    settings, seeds = to_device(settings, logits.device), to_device(mixed, logits.device)
    truncates = any(sample.top_k or sample.top_p < 1 for sample in samples)
    parts = zip(logits.split(TOGETHER), settings.split(TOGETHER), seeds.split(TOGETHER), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_draw_some(*part, truncates) for part in parts])


def _draw_some(logits: Tensor, settings: Tensor, seeds: Tensor, truncates: bool) -> Tensor:
    """logits (R, V), settings (R, 4), seeds (R,) -> (R,)"""
    temperature, top_k, top_p, min_p = settings.unsqueeze(2).unbind(1)  # (R, 1) each
    likeliest, best = logits.max(-1, keepdim=True)
    scaled = (logits - likeliest) / torch.where(temperature > 0, temperature, 1.0)
    probabilities = torch.softmax(scaled, -1)
    kept = probabilities * (probabilities >= min_p * probabilities.amax(-1, keepdim=True))
    if truncates:
        descending, order = probabilities.sort(descending=True, stable=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        first = (top_k == 0) | (rank < top_k)
        total = torch.where(top_k > 0, (descending * first).sum(-1, keepdim=True), 1.0)
        before = descending.cumsum(-1) - descending  # the mass of what is likelier
        inside = first & ((top_p >= 1) | (before < top_p * total))
        kept = kept * torch.zeros_like(inside).scatter(-1, order, inside)
    drawn = (kept / _exponential(seeds, logits.shape[1])).argmax(-1, keepdim=True)
    return torch.where(temperature > 0, drawn, best).squeeze(1)


def _exponential(seeds: Tensor, size: int) -> Tensor:
    """float64 (R, size), Exp(1): splitmix64 (Steele et al. 2014) of a counter, a stream a seed."""
    x = seeds.unsqueeze(1) + torch.arange(1, size + 1, device=seeds.device) * _signed(SPREAD)
    for shift, factor in _ROUNDS:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    uniform = (((x >> 12) & ((1 << 52) - 1)).double() + 0.5) / (1 << 52)  # never 0, never 1
    return -torch.log1p(-uniform)


def _signed(number: int) -> int:
    """The 64 bits as torch's integers have them."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _argmax(logits: Tensor) -> Tensor:
    """numpy's is eight times faster than torch's on a CPU."""
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def _draw_one(logits: Tensor, sample: Sample, history: Tensor | None, key: tuple[int, int]) -> Tensor:
    if history is not None:
        logits = _penalise(logits, history, sample.repetition_penalty)
    if sample.temperature == 0:
        return logits.argmax(-1)
    # The largest logit goes to 0 before the division: however small the temperature, nothing overflows.
    probabilities = torch.softmax((logits - logits.max()) / sample.temperature, -1)
    probabilities = _truncate(probabilities, sample)
    # Where a point between 0 and their sum falls: one number a draw, where Gumbel's trick needs one a token.
    ends = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(ends, ends[-1] * _uniform(sample.seed, *key), right=True)


def _truncate(probabilities: Tensor, sample: Sample) -> Tensor:
    """Zeros what top_k, then top_p, then min_p leave out; the likeliest always stays."""
    if sample.top_k == 0 and sample.top_p == 1:
        return probabilities * (probabilities >= sample.min_p * probabilities.max())
    likeliest, order = probabilities.topk(min(sample.top_k or CANDIDATES, len(probabilities)))
    if sample.top_k == 0 and likeliest.sum() < sample.top_p:
        likeliest, order = probabilities.sort(descending=True)
    total = likeliest.sum() if sample.top_k else 1.0
    before = likeliest.cumsum(-1) - likeliest  # the mass of what is likelier
    keep = (before < sample.top_p * total) & (likeliest >= sample.min_p * likeliest[0])
    return torch.zeros_like(probabilities).scatter(-1, order, likeliest * keep)


def _penalise(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Ids of the history: positive logits divided, negative multiplied (Keskar et al. 2019, CTRL)."""
    seen = to_device(torch.unique(history), logits.device)
    values = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(values > 0, values / penalty, values * penalty))


def _uniform(seed: int, row: int, position: int) -> float:
    """In [0, 1): splitmix64 (Steele et al. 2014)."""
    x = _mix(seed, row, position)
    for shift, factor in _ROUNDS:
        x = ((x ^ (x >> shift)) * factor) % 2**64
    return (x >> 11) / 2**53


def _mix(seed: int, row: int, position: int) -> int:
    """63 bits."""
    mixed = seed
    for part in (row, position):
        mixed = ((mixed ^ (part + SPREAD)) * SPREAD) % 2**64
        mixed ^= mixed >> 29
    return mixed % 2**63
