"""What a model does about its sink tokens, as data beside the architecture.

A sink is a token of enormous norm that others attend to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vitfold.errors import SourceError

WHOLE_COPIES = (2.0, 3.0, 4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinks:
    """Prefix registers, deletions and the other remedies; left at their defaults the fields change nothing.

    From block `start` on `rows` cached keys and values stand in front of a block's own, each counted `tau` times.
    In front of block `block` the `deletions` patch tokens of largest norm are dropped; with `deletion_site` at that
    layer's input, by their norms there: `block` is then the first that they do not enter. In the linear layers `layers`
    some tokens are apart: the `apart` largest per image, which stay float, or with `split_prefix` the prefix
    tokens, which get a range of their own. `leave_out` tokens per image are left out of the statistics of every
    range. `neurons` are pairs (block, hidden unit of its MLP) whose activations move to the model's last register.

    Source: RegCache (2510.04547), sections 3 and 4; test-time registers (2506.08010), section 4.
    """

    start: int = 0
    rows: int = 0
    tau: float = 1.0
    block: int = 0
    deletions: int = 0
    layers: tuple[str, ...] = ()
    apart: int = 0
    split_prefix: bool = False
    leave_out: int = 0
    neurons: tuple[tuple[int, int], ...] = ()
    deletion_site: str | None = None

    def __post_init__(self) -> None:
        for name in ("start", "rows", "block", "deletions", "apart", "leave_out"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise SourceError(f"sinks.{name} must be an integer of at least 0, found {value!r}")
        if not (isinstance(self.tau, int | float) and math.isfinite(self.tau) and self.tau > 0):
            raise SourceError(f"sinks.tau must be a positive number, found {self.tau!r}")
        if self.deletion_site is not None and not (isinstance(self.deletion_site, str) and self.deletions):
            raise SourceError(f"sinks.deletion_site is a layer where deletions happen, found {self.deletion_site!r}")
        if self.apart and self.split_prefix:
            raise SourceError("sinks.apart and sinks.split_prefix exclude each other")

    def cached(self, block: int) -> int:
        """Return how many cached rows stand in a block's attention."""
        return self.rows if block >= self.start else 0

    @property
    def copies(self) -> int:
        """Return how often a cached row may stand there instead of having log tau on its logit: few whole times."""
        return int(self.tau) if self.tau in WHOLE_COPIES else 1

    def deleted(self, block: int) -> int:
        """Return how many tokens less enter a block than left the merge of the one before it."""
        return self.deletions if block == self.block else 0

    def moved(self, block: int) -> tuple[int, ...]:
        """Return the hidden units of a block whose activations move to the register."""
        return tuple(unit for owner, unit in self.neurons if owner == block)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, `deletion_site` only where there is one."""
        values = {name: _plain(value) for name, value in asdict(self).items()}
        if self.deletion_site is None:
            del values["deletion_site"]
        return values


def sinks_from_dict(values: Mapping[str, Any]) -> Sinks:
    """Rebuild what `Sinks.to_dict` gave.

    Raises:
        SourceError: on an unknown key, which would change the function.
    """
    unknown = sorted(set(values) - {field.name for field in fields(Sinks)})
    if unknown:
        raise SourceError(f"unknown key sinks.{unknown[0]}; this vitfold is older than the file, upgrade vitfold")
    known = dict(values)
    known["layers"] = tuple(known.get("layers", ()))
    known["neurons"] = tuple((int(block), int(unit)) for block, unit in known.get("neurons", ()))
    return Sinks(**known)


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
