"""Times by length: each paired with the longest, a line through all, and what stands out from it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vitfold import pipeline
from vitfold.errors import RecipeError
from vitfold.model import Model
from vitfold.pipeline.lengths import LengthTime, _beside_a_line


def test_a_length_that_kernels_like_stands_out_from_the_line() -> None:
    """Time grows by 1 % per token; 40 tokens take 5 % less than that, in every round."""
    noise = np.random.default_rng(0)

    def share(length: int) -> np.ndarray:
        true = (1 - 0.01 * (48 - length)) * (0.95 if length == 40 else 1.0)
        return true * (1 + 0.002 * noise.standard_normal((6, 5)))

    rows = _beside_a_line(48, {length: share(length) for length in range(47, 31, -1)})
    assert [row.tokens for row in rows] == list(range(48, 31, -1))
    assert rows[0].ratio == 1.0
    assert not rows[0].stands_out
    best = min(rows, key=lambda row: row.beside_line)
    assert best.tokens == 40
    assert best.stands_out
    assert best.beside_line == pytest.approx(-0.05, abs=0.01)
    assert best.low <= best.ratio <= best.high
    assert all(abs(row.beside_line) < 0.01 for row in rows if row.tokens != 40)


def test_lengths_are_timed_beside_the_longest(tiny_model: Callable[..., Model]) -> None:
    plan = pipeline.optimize(tiny_model())
    tokens = plan.model.spec.tokens
    rows = pipeline.measure_lengths(plan, [tokens - 1, tokens - 3, tokens, tokens - 3], rounds=2)
    assert [row.tokens for row in rows] == [tokens, tokens - 1, tokens - 3]
    assert all(isinstance(row, LengthTime) and 0 < row.low <= row.ratio <= row.high for row in rows)


@pytest.mark.parametrize("beside", [(1, 0, -1), (-1, -2), (-1, -2, -900)])
def test_lengths_that_one_merge_does_not_lead_to_are_refused(
    tiny_model: Callable[..., Model], beside: tuple[int, ...]
) -> None:
    plan = pipeline.optimize(tiny_model())
    tokens = plan.model.spec.tokens
    with pytest.raises(RecipeError, match=f"at least three numbers of tokens from .* to {tokens}, which one merge"):
        pipeline.measure_lengths(plan, [tokens + shift for shift in beside])
