"""What is done about sink tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from vitfold.errors import RecipeError, nearest

Remedy = Literal["auto", "prefix", "delete", "regcache", "leave-out", "float-sinks", "split-scales", "neurons"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistersRecipe:
    """What is done about sink tokens before quantization.

    `remedy` names a row of `registers.REMEDIES`, "auto" whichever measures best. `site` is the layer that outliers cost
    most; its largest tokens are the candidates, None: found by measurement, with everything else that the remedy
    needs. The cached row is the mean of `average` candidates from the rank `token` on, stands in the blocks from
    `start` on and counts `tau` times; `deletions` tokens are dropped in front of `block`, or at the input of the layer
    `deletion_site` where that is given. `sinks` tokens per image are left out of statistics, or stay float in `layers`;
    `neurons` hidden units move to a register.

    Source: RegCache (2510.04547), section 4.
    """

    remedy: Remedy = "auto"
    site: str | None = None
    start: int = 0
    token: int = 0
    average: int = 1
    tau: float = 1.0
    block: int = 0
    deletions: int = 0
    sinks: int = 0
    layers: tuple[str, ...] = ()
    neurons: int = 0
    deletion_site: str | None = None

    def __post_init__(self) -> None:
        if self.remedy not in get_args(Remedy):
            raise RecipeError(
                f"registers.remedy cannot be {self.remedy!r}; {nearest(str(self.remedy), get_args(Remedy))}"
            )
        for name, least in (("start", 0), ("token", 0), ("average", 1), ("block", 0), ("deletions", 0), ("sinks", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise RecipeError(f"registers.{name} must be an integer of at least {least}, found {value!r}")
        if type(self.neurons) is not int or self.neurons < 0:
            raise RecipeError(f"registers.neurons must be an integer of at least 0, found {self.neurons!r}")
        if self.deletion_site is not None and not (isinstance(self.deletion_site, str) and self.deletions):
            raise RecipeError(
                f"registers.deletion_site is the layer at whose input registers.deletions tokens go, found "
                f"{self.deletion_site!r} and {self.deletions} deletions"
            )
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 < self.tau < math.inf:
            raise RecipeError(f"registers.tau must be a positive number, found {self.tau!r}")
        if not isinstance(self.layers, tuple) or not all(isinstance(layer, str) for layer in self.layers):
            raise RecipeError('registers.layers is a list of layers, as ["blocks.6.mlp.fc2"]')
        if self.site is not None and (self.remedy == "auto" or not isinstance(self.site, str)):
            raise RecipeError("registers.site is a layer, and needs a registers.remedy other than auto")
        object.__setattr__(self, "tau", float(self.tau))

    @property
    def resolved(self) -> bool:
        """True if nothing is left to be found by measurement."""
        return self.site is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON and TOML values, without those at their defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default or f.name == "remedy"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
