"""Remedies against sinks as a table, and which of their settings are worth measuring: rows, not code.

The rows stand in the order of what they cost at run time, the cheapest first; of two that help alike, the first
wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vitfold.model import Architecture, block_layers
from vitfold.quant.sites import apart_layers
from vitfold.recipe import RegistersRecipe, Remedy

Measure = Callable[[RegistersRecipe], float]
Grid = Callable[["Case"], Sequence[RegistersRecipe]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a grid may look at: the model, the layer around which remedies are tried, all layers with their noise.

    `site` is the noisiest layer that outlier tokens reach, the noisiest of all where none do; `noise` is squared error
    over squared output with one layer quantized alone, the noisiest first. `rare` says whether wide grids are worth
    their time: where outlier tokens reach a layer, or a remedy was asked for by name.
    """

    spec: Architecture
    site: str
    noise: tuple[tuple[str, float], ...]
    rare: bool = True

    @property
    def noisiest_site(self) -> str:
        """The layer that costs most."""
        return self.noise[0][0]

    @property
    def block(self) -> int:
        """The block of the site."""
        return block_layers(self.spec)[self.site]

    def noisiest(self, share: float) -> tuple[str, ...]:
        """Return the fewest layers that make this share of the noise, among those whose tokens can go apart."""
        parts = apart_layers(self.spec)
        able = [(layer, noise) for layer, noise in self.noise if layer in parts]
        chosen: list[str] = []
        covered, whole = 0.0, sum(noise for _, noise in able)
        for layer, noise in able:
            if chosen and covered >= share * whole:
                break
            chosen.append(layer)
            covered += noise
        return tuple(chosen)

    def recipe(self, remedy: Remedy, **settings: object) -> RegistersRecipe:
        """Return a resolved recipe at this site."""
        return RegistersRecipe(remedy=remedy, site=self.site, **settings)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemedyKind:
    """One remedy: what it does in a line, where it comes from, and its grids.

    Every grid is measured around the best setting so far of the remedy (or of `builds_on`), the first one from scratch.
    `wide` is one of too many settings for all images: it is screened on few, behind `grid`, and its best are measured.
    """

    name: Remedy
    does: str
    source: str
    grid: Grid
    wide: Callable[[RegistersRecipe, Case], Sequence[RegistersRecipe]] | None = None
    refine: tuple[Callable[[RegistersRecipe, Case], Sequence[RegistersRecipe]], ...] = ()
    builds_on: Remedy | None = None


_TAUS = (1.0, 2.0, 8.0, 15.0)
_DELETIONS = (1, 3, 6, 10)
_RANKS, _REPEATS = range(20), range(1, 16)
"""The grid of RegCache (2510.04547), section 4.2: which candidate, and how many copies of it."""


def _blocks(case: Case) -> list[int]:
    return sorted({max(case.block - back, 0) for back in (0, 1, 3)})


def _starts(case: Case) -> list[RegistersRecipe]:
    return [case.recipe("prefix", start=s, average=average, tau=4.0) for s in _blocks(case) for average in (1, 16)]


def _other_starts(best: RegistersRecipe, case: Case) -> list[RegistersRecipe]:
    return [replace(best, start=start) for start in _blocks(case) if start != best.start]


def _taus(best: RegistersRecipe, _: Case) -> list[RegistersRecipe]:
    return [replace(best, tau=tau) for tau in _TAUS if tau != best.tau]


def _published(best: RegistersRecipe, case: Case) -> list[RegistersRecipe]:
    """Every single candidate with every number of copies, from the sensitive block on.

    Two images or more give twice the patches of one.
    """
    ranks = [rank for rank in _RANKS if rank < 2 * case.spec.patches]
    base = replace(best, start=case.block, average=1)
    return [replace(base, token=rank, tau=float(tau)) for rank in ranks for tau in _REPEATS]


def _deletions(case: Case, base: RegistersRecipe) -> list[RegistersRecipe]:
    blocks = [block for block in (case.block, case.block + 1) if block < case.spec.num_layers]
    fitting = [count for count in _DELETIONS if count <= case.spec.patches // 4]
    in_front = [replace(base, block=block, deletions=count) for block in blocks for count in fitting]
    if case.site not in apart_layers(case.spec):
        return in_front
    return [*in_front, *(replace(base, block=0, deletions=count, deletion_site=case.site) for count in fitting)]


def _with_deletions(best: RegistersRecipe, case: Case) -> list[RegistersRecipe]:
    return _deletions(case, replace(best, remedy="regcache"))


def _split(case: Case) -> list[RegistersRecipe]:
    if not case.spec.prefix:
        return []
    sets = dict.fromkeys(case.noisiest(share) for share in (0.0, 0.5, 0.9))
    return [case.recipe("split-scales", layers=layers) for layers in sets]


def _float(case: Case) -> list[RegistersRecipe]:
    sets = dict.fromkeys(case.noisiest(share) for share in (0.0, 0.5))
    return [case.recipe("float-sinks", sinks=sinks, layers=layers) for layers in sets for sinks in _few((2, 8), case)]


def _few(counts: tuple[int, ...], case: Case) -> list[int]:
    """The counts that leave most tokens as they are; one token, where that is too many of each."""
    return [count for count in counts if count <= case.spec.tokens // 4] or [1]


REMEDIES: dict[Remedy, RemedyKind] = {
    kind.name: kind
    for kind in (
        RemedyKind(
            name="leave-out",
            does="the largest tokens of every image are left out of the statistics of ranges, and clipped",
            source="RegCache (2510.04547), its comparison with calibration without outliers",
            grid=lambda case: [case.recipe("leave-out", sinks=sinks) for sinks in _few((1, 4, 10), case)],
        ),
        RemedyKind(
            name="prefix",
            does="cached keys and values of a sink stand in front of every image's own, from a middle block on",
            source="RegCache (2510.04547), section 4.2",
            grid=_starts,
            wide=_published,
            refine=(_other_starts, _taus),
        ),
        RemedyKind(
            name="delete",
            does="the patch tokens of largest norm are dropped at the sensitive layer, or in front of a block",
            source="RegCache (2510.04547), section 4.3, without the prefix",
            grid=lambda case: _deletions(case, case.recipe("delete")),
        ),
        RemedyKind(
            name="regcache",
            does="both: a cached prefix, and deletion of the sinks that emerge all the same",
            source="RegCache (2510.04547)",
            grid=lambda _: [],
            refine=(_with_deletions, _taus),
            builds_on="prefix",
        ),
        RemedyKind(
            name="split-scales",
            does="prefix tokens and patches have ranges of their own in the sensitive layers",
            source="for models whose class token or trained registers are the outliers",
            grid=_split,
        ),
        RemedyKind(
            name="float-sinks",
            does="the largest tokens of every image stay float in the sensitive layers, the others run in INT8",
            source="as LLM.int8 (2208.07339) parts channels, here rows",
            grid=_float,
        ),
        RemedyKind(
            name="neurons",
            does="hidden units that make the sinks move to one added token",
            source="test-time registers (2506.08010)",
            grid=lambda case: [case.recipe("neurons", neurons=neurons) for neurons in (3, 10)],
        ),
    )
}
