"""Which remedy helps a model: every one measured under the same plain quantization, the best confirmed by the method.

Labels are not needed; where class folders give some, a remedy whose top-1 is lower beyond chance is out.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vitfold.architectures.programs import forward
from vitfold.artifacts.cache import keep_bytes, key_of, read_bytes
from vitfold.errors import RecipeError
from vitfold.images import ImageSet, batches
from vitfold.model import Model
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.quant import Progress, QuantConstraints, calibrate
from vitfold.recipe import MergeRecipe, QuantRecipe, RegistersRecipe, tokens_per_block
from vitfold.registers.curate import curate
from vitfold.registers.fold import fold_registers
from vitfold.registers.probe import Effect, Probe
from vitfold.registers.remedies import REMEDIES, Case, RemedyKind

PROBE_IMAGES = 16
LABELLED_IMAGES = 64
CONFIRM_IMAGES = 32
SCREEN_IMAGES, FINALISTS = 2, 12
"""A wide grid is measured on so many images, and so many of its settings then on all of the few."""
WORTHWHILE_DB = 0.3
RARE = 4.0
"""From this ratio of an image's largest token norm to its median on, a layer has outlier tokens."""
_FORMAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RemedyResult:
    """A remedy at its best setting under plain quantization; `confirmed_db` is the SQNR under the recipe's own method.

    `recipe` is None for doing nothing. `sqnr_db` and `cosine` compare with the float model without the remedy.
    """

    name: str
    recipe: RegistersRecipe | None
    effect: Effect
    confirmed_db: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        recipe = None if self.recipe is None else self.recipe.to_dict()
        effect = asdict(self.effect)
        del effect["right"]
        return {
            "name": self.name,
            **effect,
            "top1": self.effect.top1,
            "confirmed_db": self.confirmed_db,
            "recipe": recipe,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RemedySearchResult:
    """The case, with the noise that each layer makes alone, and the remedies; the first one is doing nothing."""

    case: Case
    remedies: tuple[RemedyResult, ...]
    chosen: RemedyResult

    @property
    def site(self) -> str:
        """The layer around which remedies were tried."""
        return self.case.site


def remedies_key(model: Model, merge: MergeRecipe, quant: QuantRecipe, images: ImageSet) -> str:
    """Return the key of the answers that a search for remedies keeps: everything that it looks at."""
    return key_of(_FORMAT, model.digest(), merge, quant, images.digest())


class _Search:
    """One model on its images: measures recipes, each once."""

    def __init__(
        self, model: Model, merge: MergeRecipe, quant: QuantRecipe, images: ImageSet, progress: Progress
    ) -> None:
        self._model, self._merge, self._quant, self._images = model, merge, quant, images
        self._progress = progress
        labelled = images.classes is not None and model.spec.head == "single_label"
        self._few = images.first(LABELLED_IMAGES if labelled else PROBE_IMAGES)
        self._probe: Probe | None = None
        self._screening: Probe | None = None
        self._key = remedies_key(model, merge, quant, images)

    def _probed(self) -> Probe:
        if self._probe is None:
            self._progress.step("float model on a few images")
            self._probe = Probe(self._model, self._merge, self._quant, self._few, advance=self._progress.advance)
        return self._probe

    def _once(self, question: object, answer: Callable[[], Any]) -> Any:
        """Return the JSON value of an answer, from the cache where it was given before."""
        key = key_of(self._key, question)
        kept = read_bytes("remedies", key, ".json")
        if kept is not None:
            return json.loads(kept)
        found = answer()
        keep_bytes("remedies", key, ".json", json.dumps(found).encode())
        return found

    def noise(self) -> list[tuple[str, float, float]]:
        """Return the noise of every layer quantized alone, the noisiest first, and how rare its largest tokens are."""

        def measure() -> list[tuple[str, float, float]]:
            probe = self._probed()
            found = []
            sites = probe.sites()
            for number, site in enumerate(sites, start=1):
                self._progress.step(f"quantizing one layer at a time: {site.layer} {number}/{len(sites)}")
                found.append((site.layer, probe.alone(site), probe.rarity(site.layer)))
            return sorted(found, key=lambda row: -row[1])

        rows = self._once("noise", measure)
        return [(str(layer), float(noise), float(rarity)) for layer, noise, rarity in rows]

    def effect(self, recipe: RegistersRecipe | None, site: str) -> Effect:
        """Measure a recipe, or the model as it is."""

        def measure() -> dict[str, Any]:
            model = self._model
            probe = self._probed()
            if recipe is not None:
                model = fold_registers(model, recipe, self._images, advance=self._progress.advance)
            return asdict(probe.effect(model, site))

        question = [None if recipe is None else recipe.to_dict(), site]
        kept = self._once(question, measure)
        right = kept["right"]
        return Effect(**{**kept, "right": None if right is None else tuple(right)})

    def finalists(self, recipes: Sequence[RegistersRecipe], site: str) -> list[RegistersRecipe]:
        """Return those of many recipes that have the highest SQNR on a few images, the best first.

        Recipes of one candidate are one answer, so that an interrupted search goes on at the next.
        """
        sqnr: list[float] = []
        groups = [list(group) for _, group in itertools.groupby(recipes, key=lambda one: one.token)]
        for number, group in enumerate(groups, start=1):
            self._progress.step(f"screening candidates: {number}/{len(groups)}")
            question = ["screen", [one.to_dict() for one in group], site]
            sqnr += self._once(question, functools.partial(self._screened, group, site))
        order = sorted(range(len(recipes)), key=lambda i: -sqnr[i])
        return [recipes[i] for i in order[:FINALISTS]]

    def _screened(self, recipes: Sequence[RegistersRecipe], site: str) -> list[float]:
        if self._screening is None:
            images = self._few.first(SCREEN_IMAGES)
            self._screening = Probe(self._model, self._merge, self._quant, images)
        probe, candidates = self._screening, curate(self._model, self._images, site)
        models = (fold_registers(self._model, one, self._images, candidates=candidates) for one in recipes)
        return [probe.effect(model, site).sqnr_db for model in models]

    def confirm(self, recipe: RegistersRecipe | None, scheme: QuantConstraints) -> float:
        """Return the SQNR of the recipe under the plan's own method, calibrated on a few images."""

        def measure() -> float:
            model = self._model
            if recipe is not None:
                model = fold_registers(model, recipe, self._images)
            calibration = self._images.first(CONFIRM_IMAGES)
            done = calibrate(model, self._merge, self._quant, calibration, scheme=scheme, progress=self._progress)
            ops = Simulate(done.model.params, done.quantizers)
            signal = noise = 0.0
            with torch.inference_mode():
                for group in batches(self._few, self._model.preprocess, batch=8):
                    pixels = torch.from_numpy(group.pixel_values)
                    expected = forward(Run(self._model.params), self._model.spec, self._merge, pixels).double()
                    found = forward(ops, done.model.spec, self._merge, pixels).double()
                    signal += float(expected.square().sum())
                    noise += float((found - expected).square().sum())
            return -10.0 * float(torch.log10(torch.tensor(max(noise / signal, 1e-12))))

        question = [None if recipe is None else recipe.to_dict(), asdict(scheme), self._quant.method, "confirm"]
        return float(self._once([*question, self._quant.attention], measure))

    def fits(self, recipe: RegistersRecipe) -> bool:
        """Say whether merging leaves room for a recipe's deletions, or for its tokens apart."""
        if recipe.remedy not in ("delete", "regcache", "float-sinks"):
            return True
        placed = recipe if recipe.remedy == "float-sinks" else replace(recipe, remedy="delete")
        try:
            spec = fold_registers(self._model, placed, self._images).spec
            tokens_per_block(spec, self._merge.r)
        except RecipeError:
            return False
        return True


def measure_remedies(
    model: Model,
    merge: MergeRecipe,
    quant: QuantRecipe,
    images: ImageSet,
    *,
    names: Sequence[str] | None = None,
    site: str | None = None,
    confirm: QuantConstraints | None = None,
    progress: Progress | None = None,
) -> RemedySearchResult:
    """Measure remedies (all, or those named) on the images and choose one, or none where none is worth it.

    A remedy is worth it from 0.3 dB on. With `confirm` the two best and doing nothing are calibrated by the plan's own
    method under that scheme, and what wins there is chosen; a single named remedy has nothing to win against.

    Raises:
        RecipeError: if the plan quantizes no layer of a block, or no named remedy fits the model.
    """
    search = _Search(model, merge, quant, images, progress or Progress())
    measured = search.noise()
    if not measured:
        raise RecipeError("the recipe leaves every layer of the blocks float, so registers cannot help; leave them out")
    reached = [layer for layer, _, rarity in measured if rarity >= RARE]
    noise, rare = tuple((layer, amount) for layer, amount, _ in measured), bool(reached) or names is not None
    case = Case(spec=model.spec, site=site or (reached or [noise[0][0]])[0], noise=noise, rare=rare)
    nothing = RemedyResult(name="none", recipe=None, effect=search.effect(None, case.site))
    best: dict[str, RemedyResult] = {}
    for kind in REMEDIES.values():
        wanted = names is None or kind.name in names
        if wanted or any(REMEDIES[name].builds_on == kind.name for name in names or ()):  # type: ignore[index]
            found = _best(kind, case, search, best, progress or Progress())
            if found is not None:
                best[kind.name] = found
    rows = [one for name, one in best.items() if names is None or name in names]
    if not rows:
        raise RecipeError(f"{', '.join(names or ())}: no setting fits this model; try --registers auto")
    forced = names is not None
    order = ranked(rows)
    if confirm is not None and (len(rows) > 1 or not forced):
        shortlist = [nothing, *order[:2]]
        sure = {one.name: replace(one, confirmed_db=search.confirm(one.recipe, confirm)) for one in shortlist}
        rows, nothing = [sure.get(one.name, one) for one in rows], sure["none"]
        order = [sure[one.name] for one in order[:2]]
        if len(order) > 1 and (order[1].confirmed_db or 0.0) > (order[0].confirmed_db or 0.0) + WORTHWHILE_DB:
            order.reverse()
    chosen = order[0] if forced or _worth(order[0], nothing) else nothing
    return RemedySearchResult(case=case, remedies=(nothing, *rows), chosen=chosen)


def _best(
    kind: RemedyKind, case: Case, search: _Search, known: dict[str, RemedyResult], progress: Progress
) -> RemedyResult | None:
    """Measure a remedy's grids, each around the best setting so far."""
    best = None if kind.builds_on is None else known.get(kind.builds_on)
    if kind.builds_on is not None and best is None:
        return None
    found: RemedyResult | None = None
    wide = () if kind.wide is None or not case.rare else (kind.wide,)
    for refine in (None, *wide, *kind.refine):
        base = found or best
        recipe = None if base is None else base.recipe
        settings = kind.grid(case) if refine is None or recipe is None else refine(recipe, case)
        if refine is not None and refine is kind.wide:
            settings = search.finalists([one for one in settings if search.fits(one)], case.site)
        for number, recipe in enumerate(settings, start=1):
            progress.step(f"measuring {kind.name}: {number}/{len(settings)}")
            if not search.fits(recipe):
                continue
            effect = search.effect(recipe, case.site)
            if found is None or _beats(effect, found.effect):
                found = RemedyResult(name=kind.name, recipe=recipe, effect=effect)
    return found


def _beats(effect: Effect, other: Effect, *, by_db: float = 0.0) -> bool:
    """Say whether top-1 is higher beyond chance, or else, where it differs by no more than chance, SQNR."""
    lead = effect.lead_over(other)
    return lead > 0 if lead else effect.sqnr_db > other.sqnr_db + by_db


def ranked(rows: Sequence[RemedyResult]) -> list[RemedyResult]:
    """Sort by effect; among those as good as the best the order of the table decides, which is that of cost."""
    most = max((one.effect for one in rows), key=lambda effect: (effect.top1 or 0.0, effect.sqnr_db))
    sound = [one for one in rows if not most.lead_over(one.effect)]
    best = max(one.effect.sqnr_db for one in sound)
    alike = [one for one in sound if one.effect.sqnr_db >= best - WORTHWHILE_DB]
    others = [one for one in rows if one not in alike]
    return alike + sorted(others, key=lambda one: (one in sound, one.effect.sqnr_db), reverse=True)


def explain(found: RemedySearchResult) -> str:
    """Return in words what was chosen, and what RegCache at its best comes to beside it."""
    rows = {one.name: one for one in found.remedies}
    cached = [rows[name] for name in ("regcache", "prefix") if name in rows]
    chosen, regcache = found.chosen, max(cached, key=lambda one: one.effect.sqnr_db, default=None)
    said = f"of the remedies against sinks {chosen.name} is taken: {_figures(chosen)}"
    if regcache is None or chosen.name in ("regcache", "prefix"):
        return f"{said}; nothing done: {_figures(rows['none'])}" if chosen is not rows["none"] else said
    recipe = regcache.recipe
    assert recipe is not None
    setting = f"start {recipe.start}, candidate {recipe.token}, mean of {recipe.average}, tau {recipe.tau:g}"
    if recipe.deletions:
        setting += f", {recipe.deletions} deletions at {recipe.deletion_site or f'block {recipe.block}'}"
    said += f"; RegCache at the best of its grid ({setting}): {_figures(regcache)}"
    if chosen is rows["none"]:
        return f"{said}, which is not worth {WORTHWHILE_DB} dB"
    apart = chosen.effect.sqnr_db - regcache.effect.sqnr_db
    return said if apart > WORTHWHILE_DB else f"{said}: about as good, and {chosen.name} costs less at run time"


def _figures(one: RemedyResult) -> str:
    by_method = "" if one.confirmed_db is None else f", {one.confirmed_db:.1f} dB by the method"
    return f"{one.effect.sqnr_db:.1f} dB under plain ranges{by_method}"


def _worth(best: RemedyResult, nothing: RemedyResult) -> bool:
    if best.confirmed_db is not None and nothing.confirmed_db is not None:
        return best.confirmed_db > nothing.confirmed_db + WORTHWHILE_DB
    return _beats(best.effect, nothing.effect, by_db=WORTHWHILE_DB)
