"""TokenCache taken apart: its method with every other score, without the choice of blocks, by every other schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

from vitfold.diffusion.methods import ReuseMethod, find_method
from vitfold.diffusion.token_choice import Schedule, Scoring
from vitfold.errors import RecipeError

Factors = Mapping[str, str]
"""What a variant takes of each factor: scores, blocks and schedule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablated:
    """A variant of a method, and what it takes of each factor."""

    method: ReuseMethod
    factors: Factors


def ablations(method: ReuseMethod) -> tuple[Ablated, ...]:
    """Return all variants of a method that chooses blocks, itself among them; all leave out as many tokens.

    Raises:
        RecipeError: if it chooses none.
    """
    if method.choice is None or not method.choice.decides:
        raise RecipeError(
            f"{method.text} chooses no blocks, so there is nothing to take away; give --reuse tokencache-blocks with a "
            "share of blocks below 1"
        )
    name, *numbers = method.text.split(":")[:4]
    share = f"{method.choice.share:g}"
    found = []
    for scores, blocks, schedule in product(get_args(Scoring), ("chosen", "all"), get_args(Schedule)):
        text = ":".join((name, *numbers, share if blocks == "chosen" else "1", scores, schedule))
        factors = {"scores": scores, "blocks": blocks, "schedule": schedule}
        found.append(Ablated(method=find_method(text), factors=factors))
    return tuple(found)


def main_effects(
    variants: Sequence[Ablated], psnr_db: Mapping[str, float | None]
) -> dict[str, dict[str, float | None]]:
    """Return for each value of each factor the mean over all variants that take it, by the text of their methods.

    A mean is None where a variant has no PSNR, since its images are equal.
    """
    effects: dict[str, dict[str, float | None]] = {}
    for factor in variants[0].factors:
        for value in dict.fromkeys(one.factors[factor] for one in variants):
            taken = [psnr_db[one.method.text] for one in variants if one.factors[factor] == value]
            known = [db for db in taken if db is not None]
            mean = sum(known) / len(known) if len(known) == len(taken) else None
            effects.setdefault(factor, {})[value] = mean
    return effects
