"""Which hidden units, heads and widths of heads stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vitfold.errors import RecipeError

WIDTH_STEP = 32
"""Kernels work on so many columns at once; a narrower MLP is a multiple of it."""
HEAD_STEP = 8
"""The same of the width of a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRecipe:
    """What of the blocks goes: a share `mlp` of the hidden units of every MLP, or what does not stay.

    `units` are the hidden units of each block that stay, `heads` the heads of its attention, `head_dims` how wide its
    heads stay: queries, keys and values alike. Nothing of that kind goes where a list is empty.
    """

    mlp: float = 0.0
    units: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.mlp, bool) or not isinstance(self.mlp, int | float) or not 0 <= self.mlp < 1:
            raise RecipeError(f"prune.mlp is the share of the units to go, above 0 and below 1, found {self.mlp!r}")
        object.__setattr__(self, "mlp", float(self.mlp))
        for name in ("units", "heads", "head_dims"):
            own = getattr(self, name)
            if not isinstance(own, list | tuple) or not all(type(one) is int and one > 0 for one in own):
                raise RecipeError(f"prune.{name} are {name} of each block that stay, at least 1, found {own!r}")
            object.__setattr__(self, name, tuple(own))
        if bool(self.mlp) == bool(self.units or self.heads or self.head_dims):
            raise RecipeError(
                "[prune] names either mlp, a share such as 0.25, or units, heads and head_dims of each block"
            )

    def units_of(self, block: int, hidden: int) -> int:
        """Return how many of a block's `hidden` units stay; by a share a multiple of 32, where there are more.

        Raises:
            RecipeError: if the recipe keeps more than there are, or is for another number of blocks.
        """
        if not self.mlp:
            return _staying("units", self.units, block, hidden)
        wanted = hidden * (1 - self.mlp)
        return min(hidden, max(WIDTH_STEP, round(wanted / WIDTH_STEP) * WIDTH_STEP))

    def heads_of(self, block: int, heads: int) -> int:
        """Return how many of a block's heads stay.

        Raises:
            RecipeError: if the recipe keeps more than there are, or is for another number of blocks.
        """
        return _staying("heads", self.heads, block, heads)

    def head_dim_of(self, block: int, head_dim: int) -> int:
        """Return how wide a block's heads stay.

        Raises:
            RecipeError: if the recipe makes them wider, or is for another number of blocks.
        """
        return _staying("head_dims", self.head_dims, block, head_dim)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON and TOML values, without what goes nowhere."""
        values = {
            "mlp": self.mlp,
            "units": list(self.units),
            "heads": list(self.heads),
            "head_dims": list(self.head_dims),
        }
        return {name: value for name, value in values.items() if value}


def _staying(name: str, kept: tuple[int, ...], block: int, there: int) -> int:
    if not kept:
        return there
    if block >= len(kept) or kept[block] > there:
        found = f"{len(kept)} blocks" if block >= len(kept) else f"{kept[block]}"
        raise RecipeError(f"prune.{name} names {found}, and block {block} of this model has {there}")
    return kept[block]
