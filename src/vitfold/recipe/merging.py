"""What merges: tokens removed in each block, by which rule, and how many are left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vitfold.errors import RecipeError
from vitfold.model import Architecture, block_layers

Order = Literal["index", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRule:
    """What a merging rule asks of a model and promises: whether it needs a class token, and whether it conserves.

    A rule conserves if the sizes of the rows that it leaves sum up to the number of original tokens.
    """

    class_token: bool = False
    conserves: bool = True


RULES: Mapping[str, MergeRule] = {
    "tome": MergeRule(),
    "nearest": MergeRule(),
    "greedy": MergeRule(),
    "tofu": MergeRule(conserves=False),
    "pitome": MergeRule(),
    "evit": MergeRule(class_token=True),
}
"""Merging rules by name; `transforms.rules` has the function of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecipe:
    """Tokens removed in each block, `r[l]` for block l, and whether attention counts merged tokens.

    `order` says in which order the rows of A that stay go on: as they stood ("index"), or by their similarity
    ("score"), which spares compilers that sort by kernels two of them. It decides who is matched with whom in the
    next merge. None: as the target prefers it; resolved recipes name one. `rule` says which tokens go, and what
    becomes of them. `compensate` says whether weights are refitted to what merging changes, on images.

    Source: ToMe (2210.09461), sections 3.1 and 3.2; its released code orders by index where a model has a class
    token, else by score.
    """

    r: tuple[int, ...]
    prop_attn: bool = True
    order: Order | None = None
    rule: str = "tome"
    compensate: bool = False

    def __post_init__(self) -> None:
        check_r(self.r, name="merge.r")
        if self.rule not in RULES:
            raise RecipeError(f"merge.rule is {', '.join(RULES)}, found {self.rule!r}")
        if self.order not in (None, *get_args(Order)):
            raise RecipeError(f"merge.order is index or score, found {self.order!r}")


def check_r(r: object, *, name: str) -> None:
    """Check that `r` is a list of integers of at least 0.

    Raises:
        RecipeError: beginning with `name`.
    """
    if isinstance(r, (list, tuple)) and all(type(n) is int and n >= 0 for n in r):
        return
    found = list(r) if isinstance(r, tuple) else r
    raise RecipeError(f"{name} must be a list of integers of at least 0, one per block, found {found!r}")


def check_mergeable(spec: Architecture) -> None:
    """Check that tokens of a model can merge at all.

    Raises:
        RecipeError: saying why they cannot.
    """
    if spec.unmergeable:
        raise RecipeError(f"tokens of this model cannot merge: {spec.unmergeable}; leave --merge out")


def largest_r(tokens: int, prefix: int) -> int:
    """Return the most tokens that one merge can remove: floor((N - P) / 2)."""
    return max(0, (tokens - prefix) // 2)


def tokens_per_block(spec: Architecture, r: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tokens that enter each block and, last, those that leave the last: L + 1 numbers.

    Equation: N_{l+1} = N_l - r_l - d_{l+1}, with the d_l sink tokens that are deleted in front of block l.

    Raises:
        RecipeError: if a block cannot remove as many tokens, naming it and the largest allowed r; if no token is left
            beside those apart.
    """
    if len(r) not in (0, spec.num_layers):
        raise RecipeError(f"merge.r has {len(r)} entries, the model has {spec.num_layers} blocks; give one per block")
    if spec.unmergeable:
        if any(r):
            check_mergeable(spec)
        return (spec.tokens,) * (spec.num_layers + 1)
    deleted = [0 if spec.sinks is None else spec.sinks.deleted(block) for block in range(spec.num_layers + 1)]
    counts = [spec.tokens - deleted[0]]
    for block, removed in enumerate(r or (0,) * spec.num_layers):
        allowed = largest_r(counts[-1], spec.fixed)
        if removed > allowed:
            raise RecipeError(
                f"r = {removed} is too large for block {block}: {counts[-1]} tokens enter it, {spec.fixed} of them "
                f"protected, so at most {allowed} can be merged; lower r there"
            )
        counts.append(counts[-1] - removed - deleted[block + 1])
        if counts[-1] < spec.fixed + 1:
            raise RecipeError(
                f"{deleted[block + 1]} deletions in front of block {block + 1} leave no patch; merge or delete fewer"
            )
    if spec.sinks is not None and spec.sinks.apart:
        apart, owners = spec.sinks.apart, block_layers(spec)
        for layer in spec.sinks.layers:
            left = counts[owners[layer] + 1]
            if apart >= left:
                raise RecipeError(
                    f"{apart} sinks apart at {layer} leave nothing to quantize of {left} tokens; give fewer"
                )
    return tuple(counts)
