"""An engine's profile joined to the model's sites and work.

What is not joined is counted, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitfold.engines.session import EngineProfile
from vitfold.ops.count import SiteCost
from vitfold.profile.ceiling import Ceiling
from vitfold.profile.kinds import KINDS, OTHER, kind_of, part_of, parts_of, place_of, site_of

_OF_COST = {"linear": "linear", "softmax": "softmax", "normalization": "normalization", "activation": "activation",
            "layout": "layout"}  # fmt: skip
PRODUCTS = ("linear", "attention")
"""The kinds whose time a ceiling is compared with; others move data that may lie in caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the program does, for one batch: MACs of float and of integer products, bytes moved, weights among them."""

    float_macs: int = 0
    integer_macs: int = 0
    moved_bytes: int = 0
    weight_bytes: int = 0

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.float_macs + self.integer_macs

    def plus(self, other: Work) -> Work:
        """Both together."""
        return Work(
            float_macs=self.float_macs + other.float_macs,
            integer_macs=self.integer_macs + other.integer_macs,
            moved_bytes=self.moved_bytes + other.moved_bytes,
            weight_bytes=self.weight_bytes + other.weight_bytes,
        )


_CLEARLY = 1.05
_PerPart = dict[tuple[str, str], Work]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTime:
    """One kind of operation: nanoseconds and nodes per run, work, and how near to the ceiling it runs.

    `ceiling_ratio` is the least time that the work takes on this machine over the time it took, at most 1: None without
    a ceiling, and for kinds that only move data. `beyond_ceiling` says that it took clearly less than that: then the
    ceiling was measured in a slower moment.
    """

    kind: str
    latency_ns: float
    nodes: int
    work: Work
    ceiling_ratio: float | None
    beyond_ceiling: bool = False

    @property
    def gmacs_per_s(self) -> float | None:
        """Achieved multiply-accumulates, None where it multiplies nothing."""
        return self.work.macs / self.latency_ns if self.work.macs and self.latency_ns else None

    @property
    def gbytes_per_s(self) -> float | None:
        """Achieved bytes, None where none are counted."""
        return self.work.moved_bytes / self.latency_ns if self.work.moved_bytes and self.latency_ns else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTime:
    """The nanoseconds of one part, "embed", "blocks.N" or "head", by kind, and the MACs counted there."""

    block: str
    latency_ns: Mapping[str, float]
    macs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where the time of one batch goes.

    `profiled_ns` and `plain_ns` are the median runs with and without the profiler. `outside_ns` is what the fastest
    profiled run took beyond its nodes; `unnamed_ns` belongs to nodes without a site, whose blocks are those of the
    nodes behind. `merging_saves_ns` is what the merged tokens would have cost at the rates of this profile, by block
    and kind; None where nothing merges.
    """

    batch: int
    kinds: tuple[KindTime, ...]
    blocks: tuple[BlockTime, ...]
    profiled_ns: float
    fastest_ns: float
    plain_ns: float
    unnamed_ns: float
    ceiling: Ceiling | None
    merging_saves_ns: float | None

    @property
    def nodes_ns(self) -> float:
        """All nodes together."""
        return sum(kind.latency_ns for kind in self.kinds)

    @property
    def outside_ns(self) -> float:
        """The engine between nodes, and the profiler; slower runs also met other programs."""
        return max(0.0, self.fastest_ns - self.nodes_ns)

    @property
    def overhead_ratio(self) -> float:
        """What the profiler added to a run; below 0 where the machine's noise is larger."""
        return self.profiled_ns / self.plain_ns - 1

    @property
    def beyond_ceiling(self) -> bool:
        """Whether products ran clearly faster than the ceiling, which then was measured in a slower moment."""
        return any(one.beyond_ceiling for one in self.kinds)

    def of(self, kind: str) -> KindTime:
        """One kind."""
        return self.kinds[KINDS.index(kind)]

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "batch": self.batch,
            "latency_ms": {"plain": self.plain_ns / 1e6, "profiled": self.profiled_ns / 1e6},
            "overhead_ratio": self.overhead_ratio,
            "nodes_ms": self.nodes_ns / 1e6,
            "outside_ms": self.outside_ns / 1e6,
            "unnamed_ms": self.unnamed_ns / 1e6,
            "kinds": [
                {
                    "kind": one.kind,
                    "ms": one.latency_ns / 1e6,
                    "ratio": one.latency_ns / self.nodes_ns if self.nodes_ns else 0.0,
                    "nodes": one.nodes,
                    "macs": one.work.macs,
                    "integer_macs": one.work.integer_macs,
                    "bytes": one.work.moved_bytes,
                    "gmacs_per_s": one.gmacs_per_s,
                    "gbytes_per_s": one.gbytes_per_s,
                    "ceiling_ratio": one.ceiling_ratio,
                }
                for one in self.kinds
            ],
            "blocks": [
                {"block": one.block, "ms": {kind: ns / 1e6 for kind, ns in one.latency_ns.items()}, "macs": one.macs}
                for one in self.blocks
            ],
            "merging": {
                "costs_ms": self.of("merging").latency_ns / 1e6,
                "saves_ms": None if self.merging_saves_ns is None else self.merging_saves_ns / 1e6,
            },
            "ceiling": None if self.ceiling is None else self.ceiling.to_dict(),
            "beyond_ceiling": self.beyond_ceiling,
        }


def join(
    measured: EngineProfile,
    costs: Sequence[SiteCost],
    *,
    batch: int,
    unmerged: Sequence[SiteCost] | None = None,
    ceiling: Ceiling | None = None,
) -> Profile:
    """Join nodes to blocks and kinds, and both to the work per site of one image.

    `unmerged` is the work of the same model without merging, where it merges. The products that ran in integers are
    those whose nodes say so; their weights count one byte each.
    """
    names = [node.name for node in measured.nodes]
    integer = frozenset(site for node in measured.nodes if node.integer and (site := site_of(node.name)))
    time = dict.fromkeys(KINDS, 0.0)
    count = dict.fromkeys(KINDS, 0)
    per_block: dict[str, dict[str, float]] = {"embed": {}}
    for node, part in zip(measured.nodes, parts_of(names), strict=True):
        kind = kind_of(node.name, node.op)
        time[kind] += node.latency_ns
        count[kind] += 1
        block = per_block.setdefault(part, {})
        block[kind] = block.get(kind, 0.0) + node.latency_ns
    work = _work(costs, batch, integer)
    return Profile(
        batch=batch,
        kinds=tuple(_kind(kind, time[kind], count[kind], _total(work, kind=kind), ceiling) for kind in KINDS),
        blocks=tuple(
            BlockTime(block=part, latency_ns=found, macs=_total(work, part=part).macs)
            for part, found in sorted(per_block.items(), key=lambda item: place_of(item[0]))
        ),
        profiled_ns=float(np.median(measured.profiled_ns)),
        fastest_ns=float(min(measured.profiled_ns)),
        plain_ns=float(np.median(measured.plain_ns)),
        unnamed_ns=float(sum(node.latency_ns for node in measured.nodes if site_of(node.name) is None)),
        ceiling=ceiling,
        merging_saves_ns=None if unmerged is None else _saved(per_block, work, _work(unmerged, batch, integer)),
    )


def _saved(time: Mapping[str, Mapping[str, float]], now: _PerPart, before: _PerPart) -> float:
    """Nanoseconds that would come on top without merging: each kind of each block grows as its work does."""
    saved = 0.0
    for part, kinds in time.items():
        for kind, latency_ns in kinds.items():
            counted = (part, "linear" if kind == "quantize" else kind)
            if kind != "merging" and counted in before:
                saved += latency_ns * (_growth(now.get(counted, Work()), before[counted]) - 1)
    return saved


def _growth(now: Work, before: Work) -> float:
    """How much more there was to do: MACs, or bytes where nothing is multiplied."""
    if now.macs:
        return before.macs / now.macs
    return before.moved_bytes / now.moved_bytes if now.moved_bytes else 1.0


def _total(work: _PerPart, *, part: str | None = None, kind: str | None = None) -> Work:
    """The work of one part, or of one kind."""
    total = Work()
    for (found_part, found_kind), one in work.items():
        if part in (None, found_part) and kind in (None, found_kind):
            total = total.plus(one)
    return total


def _kind(kind: str, latency_ns: float, nodes: int, work: Work, ceiling: Ceiling | None) -> KindTime:
    ratio, beyond = None, False
    if not nodes:
        work = replace(work, moved_bytes=0, weight_bytes=0)
    if ceiling is not None and latency_ns and kind in PRODUCTS:
        least_ns = ceiling.least_ns(
            float_macs=work.float_macs, integer_macs=work.integer_macs, read_bytes=work.weight_bytes
        )
        ratio, beyond = min(1.0, least_ns / latency_ns), least_ns > _CLEARLY * latency_ns
    return KindTime(
        kind=kind, latency_ns=latency_ns, nodes=nodes, work=work, ceiling_ratio=ratio, beyond_ceiling=beyond
    )


def _work(costs: Sequence[SiteCost], batch: int, integer: frozenset[str]) -> _PerPart:
    """Work per part and kind; weights are read once per batch, activations once per image."""
    total: _PerPart = {}
    for cost in costs:
        codes = cost.site in integer
        weights = cost.weight_bytes // 4 if codes else cost.weight_bytes
        one = Work(
            float_macs=0 if codes else cost.macs * batch,
            integer_macs=cost.macs * batch if codes else 0,
            moved_bytes=cost.activation_bytes * batch + weights,
            weight_bytes=weights,
        )
        place = (_part_of_cost(cost), _kind_of_cost(cost))
        total[place] = total.get(place, Work()).plus(one)
    return total


def _part_of_cost(cost: SiteCost) -> str:
    return part_of(cost.site) if cost.block is None else f"blocks.{cost.block}"


def _kind_of_cost(cost: SiteCost) -> str:
    by_site = kind_of(cost.site, "")
    if by_site == "merging" or (cost.kind == "reduction" and cost.role == "merge"):
        return "merging"
    if cost.kind == "matmul":
        return "attention"
    return _OF_COST.get(cost.kind, OTHER)
