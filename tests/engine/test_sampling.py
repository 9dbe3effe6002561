import pytest
import torch

from engine.batch import Sample
from engine.sampling import draw

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0]])


def drawn(sample: Sample, count: int = 400, history: torch.Tensor | None = None) -> set[int]:
    return {int(draw(LOGITS, [sample], [history], [(0, position)])) for position in range(count)}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.7}, {0, 1}),
        ({"min_p": 0.3}, {0, 1}),
    ],
)
def test_what_may_be_drawn(options: dict[str, float], kept: set[int]) -> None:
    assert drawn(Sample(temperature=1.0, **options)) == kept  # type: ignore[arg-type]


def test_a_draw_depends_on_seed_row_and_position_only() -> None:
    sample, keys = Sample(temperature=1.0, seed=5), [(0, 3), (1, 3), (0, 4)]
    together = draw(LOGITS.expand(3, 4), [sample] * 3, [None] * 3, keys)
    alone = [draw(LOGITS, [sample], [None], [key]) for key in keys]
    assert torch.equal(together, torch.cat(alone))


def test_a_penalty_divides_what_was_said_already() -> None:
    assert drawn(Sample(repetition_penalty=4.0), 1, torch.tensor([0])) == {1}
