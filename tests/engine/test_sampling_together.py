"""Drawing for all rows at once, as on a GPU, against the draws of one row at a time: the same odds, other draws."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import Sample
from engine.sampling import draw, draw_together

sampling = st.builds(
    Sample,
    temperature=st.sampled_from([0.0, 1e-30, 0.7, 1.5]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    min_p=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 3.0]),
)


def counts(logits: Tensor, sample: Sample, times: int) -> Tensor:
    keys = [(0, position) for position in range(times)]
    tokens = draw_together(logits.expand(times, -1), [sample] * times, [None] * times, keys)
    return torch.bincount(tokens, minlength=logits.shape[-1])


@given(samples=st.lists(sampling, min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_row_draws_what_it_may_and_the_same_in_any_company(samples: list[Sample], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(samples), 30, generator=generator) * 3
    histories = [
        torch.randint(0, 30, (4,), generator=generator) if sample.repetition_penalty != 1 else None
        for sample in samples
    ]
    keys = [(row % 3, 7 * row) for row in range(len(samples))]
    together = draw_together(logits, samples, histories, keys)
    for row, sample in enumerate(samples):
        one = slice(row, row + 1)
        alone = draw_together(logits[one], [sample], histories[one], keys[one])
        assert torch.equal(alone, together[one])
        if sample.temperature < 1e-3:
            assert torch.equal(alone, draw(logits[one], [sample], histories[one], keys[one]))


@pytest.mark.parametrize(
    "sample",
    [
        Sample(temperature=1.0),
        Sample(temperature=0.6, seed=9),
        Sample(temperature=1.0, top_k=3),
        Sample(temperature=1.3, top_p=0.6),
        Sample(temperature=1.0, top_k=4, top_p=0.7),
        Sample(temperature=1.0, min_p=0.4),
        Sample(temperature=1.0, top_p=0.9, min_p=0.3),
    ],
)
def test_the_odds_are_those_of_the_slow_way(sample: Sample) -> None:
    """Against 4,000 draws of one row at a time; no token's share is further off than six deviations."""
    logits, times = torch.tensor([[2.0, 1.0, 0.5, 1.5, -1.0, 0.8]]), 4000
    keys = [(0, position) for position in range(times)]
    slow = torch.cat([draw(logits, [replace(sample, seed=1)], [None], [key]) for key in keys])
    expected = torch.bincount(slow, minlength=6)
    fast = counts(logits, sample, times)
    assert torch.equal(fast > 0, expected > 0)
    share = (fast + expected) / (2 * times)
    assert ((fast - expected).abs() <= 6 * (2 * times * share * (1 - share)).sqrt()).all()


def test_seeds_rows_and_positions_draw_apart() -> None:
    logits, sample = torch.zeros(200, 1000), Sample(temperature=1.0, seed=5)
    keys = [(row, position) for row in range(2) for position in range(100)]
    drawn = draw_together(logits, [sample] * 200, [None] * 200, keys)
    other = draw_together(logits, [replace(sample, seed=6)] * 200, [None] * 200, keys)
    assert len(set(drawn.tolist())) > 150
    assert (drawn != other).float().mean() > 0.95


def test_a_token_that_is_rare_in_a_large_vocabulary_is_drawn_as_rarely() -> None:
    """Half of all draws are of the first token, the rest of 50,000 others alike."""
    logits = torch.zeros(1, 50_001)
    logits[0, 0] = torch.log(torch.tensor(50_000.0))
    tokens = draw_together(
        logits.expand(400, -1), [Sample(temperature=1.0)] * 400, [None] * 400, [(0, i) for i in range(400)]
    )
    assert 140 < int((tokens == 0).sum()) < 260
    assert len(set(tokens.tolist())) > 130
