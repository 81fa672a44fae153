"""What a search is for: the least latency within a drop, or the least drop within a latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitfold.bench.statistics import Drop
from vitfold.pipeline.trials import Trial
from vitfold.recipe import PruneRecipe, check_prune
from vitfold.schedule.solve import Point

CLOSE = 1.03
COARSE = (0.3, 0.4, 0.5, 0.6)
"""Shares of the blocks' work that arms may lack where nothing says which of them is worth trying."""
_GENTLER = 0.75
_MARGIN = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrower:
    """What of the blocks stays where a share of their work goes, and the drop that this alone is believed to cost."""

    share: float
    prune: PruneRecipe
    lost: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arm:
    """Bits and a target, with the schedules that none beats in both predicted time and distortion.

    `points` run from the fastest, which distorts most, to no merging; seconds are relative to the float model's.
    `prune` says which heads and hidden units stay, None where all do; `share` is what then goes of the blocks' work,
    and `lost` the drop that this alone is believed to cost.
    """

    quant: str
    target: str
    points: tuple[Point, ...]
    rule: str = "tome"
    share: float = 0.0
    prune: PruneRecipe | None = None
    lost: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        points = [[seconds, distortion, list(r)] for seconds, distortion, r in self.points]
        prune = None if self.prune is None else self.prune.to_dict()
        values = {"quant": self.quant, "target": self.target, "rule": self.rule}
        return {**values, "share": self.share, "lost": self.lost, "prune": prune, "points": points}

    def attempt(
        self,
        index: int,
        float_sites: int = 0,
        *,
        wide: bool = False,
        compensate: bool = False,
        registers: bool = False,
    ) -> Trial:
        """Return the recipe of a point."""
        r = self.points[index][2]
        kept = f"-{'wide' if wide else 'float'}{float_sites}" if float_sites else ""
        kept += "-compensated" if compensate else ""
        kept += "-registers" if registers else ""
        rule = self.rule if any(r) else "tome"  # where nothing merges all rules are one
        kept += f"-{rule}" if rule != "tome" else ""
        kept += f"-prune{100 * self.share:g}" if self.share else ""
        name = f"{self.quant}-{self.target}{kept}-r{'_'.join(map(str, r))}"
        method = None if self.quant == "none" else "vitfold"
        return Trial(
            name=name,
            r=r,
            rule=rule,
            quant=self.quant,
            method=method,
            target=self.target,
            float_sites=float_sites,
            wide=wide,
            compensate=compensate,
            prune=self.prune,
            registers=registers,
        )


def arm_from_dict(values: Mapping[str, Any]) -> Arm:
    """Rebuild an arm from `Arm.to_dict`."""
    points = tuple((seconds, distortion, tuple(r)) for seconds, distortion, r in values["points"])
    prune = check_prune(values["prune"], name="arms")
    named = {name: values[name] for name in ("quant", "target", "rule", "share", "lost")}
    return Arm(**named, prune=prune, points=points)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastLatency:
    """The fastest recipe that drops at most `max_drop`, a share of the images, on held-out images too.

    `screen` returns the drop of a point's merging alone, by a rule, `screen_pruned` that of pruning alone.
    """

    max_drop: float
    screen: Callable[[Point, str], Drop]
    screen_pruned: Callable[[Narrower], Drop]

    def worth_trying(self, narrower: Sequence[Narrower]) -> list[Narrower]:
        """Bisect for the largest share whose pruning alone keeps the bound; return it and its neighbours.

        A gentler one leaves some of the bound to merging; the next bolder one stays unless it surely breaks it. What
        was not looked at drops as much as the line between those that were.
        """
        low, high, seen = -1, len(narrower), dict[int, Drop]()
        while high - low > 1:
            middle = (low + high) // 2
            seen[middle] = self.screen_pruned(narrower[middle])
            low, high = (middle, high) if seen[middle].drop <= self.max_drop else (low, middle)
        if high in seen and seen[high].low <= self.max_drop:
            high += 1
        at = {0.0: 0.0, **{narrower[i].share: max(0.0, seen[i].drop) for i in sorted(seen)}}
        shares, drops = list(at), list(at.values())
        first = max(0, low - 1)
        return [replace(one, lost=float(np.interp(one.share, shares, drops))) for one in narrower[first:high]]

    def start(self, arm: Arm) -> int:
        """Bisect for the fastest schedule whose merging alone keeps what pruning leaves of the bound."""
        bound = self.max_drop - arm.lost
        low, high = 0, len(arm.points) - 1
        while low < high:
            middle = (low + high) // 2
            if self.screen(arm.points[middle], arm.rule).drop <= bound:
                high = middle
            else:
                low = middle + 1
        return low

    def meets(self, row: Mapping[str, Any]) -> bool:
        """Leave half a standard error to the bound: the luckiest of several looks better than it is."""
        if row["drop"] is None:
            return False
        drop = Drop(**row["drop"])
        return drop.drop <= self.max_drop - _MARGIN * min(drop.standard_error, self.max_drop)

    def further(self, arm: Arm, index: int) -> int | None:
        """The next schedule that distorts clearly less."""
        wanted = _GENTLER * arm.points[index][1]
        return next((i for i in range(index + 1, len(arm.points)) if arm.points[i][1] <= wanted), None)

    def bolder(self, arm: Arm, index: int, *, compensated: bool = False) -> int | None:
        """The next schedule that distorts clearly more, unless merging alone surely breaks the bound.

        What compensation makes of merging is not known before; there the trial decides.
        """
        wanted = arm.points[index][1] / _GENTLER
        found = next((i for i in range(index - 1, -1, -1) if arm.points[i][1] >= wanted), None)
        if compensated:
            return found
        return None if found is None or self.screen(arm.points[found], arm.rule).low > self.max_drop else found

    def cost(self, arm: Arm, index: int) -> float:
        """Seconds, relative to the float model's."""
        return arm.points[index][0]

    def reached(self, row: Mapping[str, Any]) -> float:
        """The same, measured."""
        return 1 / float(row["speedup"]["median"]) if row["speedup"] is not None else float("inf")

    def missed_by(self, row: Mapping[str, Any]) -> float:
        """How much more it drops than it may."""
        return float(row["drop"]["drop"]) - self.max_drop if row["drop"] is not None else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastDrop:
    """The most accurate recipe within `max_latency_ms` per call; `plain_ms` is what the float model takes.

    Nothing is asked of held-out images: their drop is what it is.
    """

    max_latency_ms: float
    plain_ms: float
    max_drop: float = 1.0

    def worth_trying(self, narrower: Sequence[Narrower]) -> list[Narrower]:
        """Some shares of all: what they drop is found out by trying them."""
        return [one for one in narrower if one.share in COARSE]

    def start(self, arm: Arm) -> int:
        """The least distortion that is predicted to be fast enough."""
        fast = [i for i in range(len(arm.points)) if arm.points[i][0] * self.plain_ms <= self.max_latency_ms]
        return max(fast, default=0)

    def meets(self, row: Mapping[str, Any]) -> bool:
        """The measured median is within the bound."""
        return self.missed_by(row) <= 0

    def further(self, arm: Arm, index: int) -> int | None:
        """The next schedule that is predicted to take clearly less."""
        wanted = arm.points[index][0] / CLOSE
        return next((i for i in range(index - 1, -1, -1) if arm.points[i][0] <= wanted), None)

    def bolder(self, arm: Arm, index: int, *, compensated: bool = False) -> int | None:  # noqa: ARG002
        """The next schedule that is predicted to take clearly longer, and distorts less."""
        wanted = arm.points[index][0] * CLOSE
        return next((i for i in range(index + 1, len(arm.points)) if arm.points[i][0] >= wanted), None)

    def cost(self, arm: Arm, index: int) -> float:
        """Distortion."""
        return arm.points[index][1]

    def reached(self, row: Mapping[str, Any]) -> float:
        """The measured drop."""
        return float(row["drop"]["drop"]) if row["drop"] is not None else float("inf")

    def missed_by(self, row: Mapping[str, Any]) -> float:
        """How many milliseconds too many."""
        return float(row["latency_ns"]["median"]) / 1e6 - self.max_latency_ms if row["latency_ns"] else float("inf")


Goal = LeastLatency | LeastDrop
