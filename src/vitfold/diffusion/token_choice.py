"""Which blocks a refreshed step reuses: by the scores of their tokens, and by turns, as TokenCache's schedule says.

Runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from vitfold.errors import RecipeError
from vitfold.model import DiTSpec

Scoring = Literal["predictor", "random", "norm"]
"""What scores tokens: a trained network, chance, or the norm of what each block last added to each token."""
Schedule = Literal["tprr", "one-phase", "uniform"]
"""When steps are full and how blocks are chosen: in two phases, by turns; in one phase, by turns; evenly, by scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChoice:
    """How a refreshed step chooses blocks: `share` of them leave out tokens, all others run in full.

    In the first phase of `tprr` scores alone choose; in the second blocks take turns: what has been reused longest
    runs in full first, so that no block's values grow older than the turn that all of them take. `one-phase` is the
    second policy in all steps, `uniform` the first one.
    """

    share: float
    scoring: Scoring
    schedule: Schedule

    @property
    def decides(self) -> bool:
        """Whether an image's own scores decide which blocks run."""
        return self.share < 1

    def reused_blocks(self, depth: int) -> int:
        """Return how many of `depth` blocks leave out tokens."""
        return min(depth, max(1, math.ceil(self.share * depth - 1e-9)))

    def renewed_tokens(self, spec: DiTSpec, ratio: float) -> int:
        """Return how many tokens such a block computes anew, if a step leaves out `ratio` of all blocks' tokens.

        Equation: K = N - ratio L N / M, of M blocks.
        """
        left_out = ratio * spec.num_layers * spec.tokens / self.reused_blocks(spec.num_layers)
        return max(0, spec.tokens - round(left_out))

    def by_turns(self, step: int, steps: int) -> bool:
        """Whether blocks take turns at this step."""
        return self.schedule == "one-phase" or (self.schedule == "tprr" and 2 * step >= steps)


def check_share(share: float, ratio: float) -> None:
    """Check that the blocks that leave out tokens have as many.

    Raises:
        RecipeError: if they have not.
    """
    if ratio > share:
        raise RecipeError(
            f"{ratio:g} of all tokens cannot be left out by {share:g} of the blocks; name a larger share of blocks"
        )


def choose_blocks(
    importance: Float[np.ndarray, " L"], ages: Sequence[int], count: int, *, by_turns: bool
) -> frozenset[int]:
    """Return the `count` blocks that leave out tokens: those that matter least by the mean score of their tokens.

    `ages` are the refreshed steps since each block ran in full. By turns the oldest run in full first, whatever their
    scores: of L blocks, none is reused more than ceil(L / (L - count)) - 1 times in a row.

    Source: TokenCache (2409.18523), its block selection; the turns are ours.
    """
    first = sorted(range(len(ages)), key=lambda block: (-ages[block] if by_turns else 0, -float(importance[block])))
    return frozenset(first[len(ages) - count :])
