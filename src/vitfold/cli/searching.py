"""`vitfold optimize --max-drop` and `--max-latency-ms`: recipes found by measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfold.artifacts.bundle import copy_bundle, publish_bundle
from vitfold.artifacts.cache import entry_folder, key_of
from vitfold.artifacts.digested import reserve_bundle
from vitfold.artifacts.journal import ROWS, alone
from vitfold.bench.environment import environment
from vitfold.bench.reference import Reference, reference_outputs
from vitfold.cli.groups import CalibrationArgs, SearchArgs
from vitfold.cli.making import given_images, judged_images
from vitfold.cli.terminal import heading, note, out, print_json, working
from vitfold.engines import engine_obstacle
from vitfold.errors import VitfoldError
from vitfold.processor import processor
from vitfold.report.tables import drop_text, sweep_table
from vitfold.storage.placing import check_space
from vitfold.target import find_target

if TYPE_CHECKING:
    from vitfold.images import ImageSet
    from vitfold.model import Model
    from vitfold.pipeline.goals import Goal
    from vitfold.pipeline.search import SearchContext, SearchResult

ENGINES = ("cpu", "openvino", "openvino-bf16")
_FORMAT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    """What a search is for and what it may try; its drop is in percentage points of top-1 or agreement."""

    search: SearchArgs
    calibration: CalibrationArgs
    calibration_images: Path | None
    quant: str | None
    target: str | None

    def quants(self) -> list[str]:
        """Bits to try: the one that was named, or float and W8A8."""
        return [self.quant.lower()] if self.quant is not None else ["none", "w8a8"]

    def targets(self) -> list[str]:
        """Targets to try: the one that was named, or every engine for CPUs that starts here."""
        if self.target not in (None, "fastest"):
            return [str(self.target)]
        return [name for name in ENGINES if engine_obstacle(find_target(name).engine) is None]


def run_search(model: Model, images: ImageSet, output: Path, wanted: Bounded, *, overwrite: bool, json: bool) -> None:
    """Search, write the winner's bundle, and say what was tried.

    Raises:
        VitfoldError: if the images are too few, or a latency bound is met by nothing.
    """
    from vitfold.pipeline.search import check_enough, find_arms, search
    from vitfold.pipeline.trials import check_decides

    check_decides(model.spec.head)
    images = judged_images(images, model.spec, model.labels)
    divided, before = _divided(images, wanted), environment()
    if wanted.search.max_drop is not None:
        check_enough(len(divided.held_out.paths), wanted.search.max_drop / 100)
    with _kept(), reserve_bundle(output, overwrite=overwrite) as place, working("search") as (say, _):
        check_space(place.destination, model.size_bytes)
        folder = _folder(model, divided, wanted)
        with alone(folder / ROWS):
            laboratory = _laboratory(model, divided, wanted, folder, say)
            goal = _goal(laboratory, wanted)
            arms = find_arms(laboratory, wanted.quants(), wanted.targets(), goal)
            found = search(laboratory, arms, goal, minutes=wanted.search.search_minutes)
            fidelity: Mapping[str, Any] | None
            if found.winner is not None:
                winner, fidelity = found.winner.bundle, found.winner.fidelity.to_dict()
            elif wanted.search.max_drop is not None:
                winner, fidelity = laboratory.plain, laboratory.plain.manifest.fidelity
            else:
                raise VitfoldError(_nothing(found, wanted))
            publish_bundle(place, copy_bundle(winner, place.draft(), fidelity=fidelity))
    document = {
        "bundle": str(output),
        "environment": before,
        "images": {
            "calibration": len(divided.calibration.paths),
            "refitting": 0 if divided.refitting is None else len(divided.refitting.paths),
            "search": len(divided.chosen.paths),
            "held_out": len(divided.held_out.paths),
        },
        "winner": None if found.winner is None else found.winner.row["recipe"],
        "held_out": None if found.winner is None else found.winner.held_out.to_dict(),
        "verified": found.verified,
        "reason": found.reason,
        "rows": [dict(row) for row in found.rows],
    }
    if json:
        print_json(document)
        return
    _report(document, found, wanted)


@contextmanager
def _kept() -> Iterator[None]:
    """Tell whoever interrupts a search that it goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        note("what was measured is kept: the same command goes on from there")
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Divided:
    """Images for calibration, those that layers are refitted on, if any, those to choose by, and those to verify on."""

    calibration: ImageSet
    refitting: ImageSet | None
    chosen: ImageSet
    held_out: ImageSet


def _divided(images: ImageSet, wanted: Bounded) -> _Divided:
    from vitfold.pipeline.search import divided_for_search

    calibration, refitting, others = _apart(images, wanted)
    chosen, held_out = divided_for_search(others, seed=wanted.calibration.calibration_seed)
    return _Divided(calibration=calibration, refitting=refitting, chosen=chosen, held_out=held_out)


def _apart(images: ImageSet, wanted: Bounded) -> tuple[ImageSet, ImageSet | None, ImageSet]:
    """Return the images for calibration, those that layers are refitted on, if any, and the others."""
    from vitfold.pipeline.search import divided_for_refitting, enough_for_refitting

    size, seed = wanted.calibration.calibration_size, wanted.calibration.calibration_seed
    if wanted.calibration_images is not None:
        own = given_images(wanted.calibration_images)
        return own.sample(size, seed=seed), enough_for_refitting(own), images
    calibration = images.sample(size, seed=seed)
    others = images.without(calibration)
    if others is None:
        raise VitfoldError(
            f"all {len(images.paths)} images of {images.root} went into calibration; give more of them, or a smaller "
            "--calibration-size: a search chooses and verifies on others"
        )
    refitting, others = divided_for_refitting(others, seed=seed)
    return calibration, refitting, others


def _folder(model: Model, divided: _Divided, wanted: Bounded) -> Path:
    """Return where the rows and bundles of this search lie, for the same command to go on with."""
    drawn = (divided.chosen, divided.held_out, divided.calibration, divided.refitting)
    digests = [model.digest(), *(images.digest() for images in drawn if images is not None)]
    settings = [
        _FORMAT,
        *digests,
        processor(),
        wanted.targets(),
        wanted.calibration.calibration_size,
        wanted.calibration.calibration_seed,
    ]
    return entry_folder("searches", key_of(*settings))


def _laboratory(model: Model, divided: _Divided, wanted: Bounded, folder: Path, say: Any) -> SearchContext:
    from vitfold.pipeline.search import SearchContext
    from vitfold.pipeline.trial import SHORT
    from vitfold.pipeline.trials import EvalContext

    digest = model.digest()

    def trying(images: ImageSet) -> EvalContext:
        say("running the float model over the images, once")
        return EvalContext(
            model=model,
            calibration=divided.calibration,
            calibration_size=wanted.calibration.calibration_size,
            calibration_seed=wanted.calibration.calibration_seed,
            images=images,
            expected=reference_outputs(digest, images, model.preprocess, lambda: Reference(model=model)),
            protocol=SHORT,
            refitting=divided.refitting,
        )

    return SearchContext(trying=trying(divided.chosen), held_out=trying(divided.held_out), folder=folder, say=say)


def _goal(laboratory: SearchContext, wanted: Bounded) -> Goal:
    from vitfold.pipeline.goals import LeastDrop, LeastLatency

    if wanted.search.max_drop is not None:
        return LeastLatency(
            max_drop=wanted.search.max_drop / 100, screen=laboratory.screen, screen_pruned=laboratory.screen_pruned
        )
    assert wanted.search.max_latency_ms is not None
    return LeastDrop(max_latency_ms=wanted.search.max_latency_ms, plain_ms=laboratory.plain_ms())


def _report(document: dict[str, Any], found: SearchResult, wanted: Bounded) -> None:
    out.print(sweep_table(found.rows))
    images = document["images"]
    out.print(
        f"calibrated on {images['calibration']} images, weights refitted on {images['refitting']}, chosen on "
        f"{images['search']}, verified on {images['held_out']}",
    )
    if found.winner is None:
        note(_nothing(found, wanted))
    else:
        row, held_out = found.winner.row, found.winner.held_out
        ratio = row["speedup"]
        heading(row["recipe"])
        out.print(
            f"  {ratio['median']:.2f}x over float, 95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}",
        )
        noise = ", which chance alone explains" if held_out.is_noise else ""
        out.print(f"  drop on held-out images {drop_text(held_out.to_dict())} points{noise}")
    out.print(f"  bundle    {document['bundle']}")
    note(f"search ended: {found.reason}; {found.verified} recipes were verified on held-out images")


def _nothing(found: SearchResult, wanted: Bounded) -> str:
    """Say that nothing met the bound, and what came nearest."""
    drop, latency = wanted.search.max_drop, wanted.search.max_latency_ms
    bound = f"at most {drop:g} points" if drop is not None else f"{latency:g} ms"
    missed = "nothing was measured" if found.nearest is None else f"the nearest miss is {_summary(found.nearest)}"
    if wanted.search.max_drop is not None:
        return f"nothing faster than the float model keeps {bound}: {missed}; the bundle is the float model"
    return f"nothing takes {bound} or less: {missed}; allow more, or give a smaller model"


def _summary(row: Any) -> str:
    drop, latency = row["drop"], row["latency_ns"]
    lost = "no drop measured" if drop is None else f"{100 * drop['drop']:.2f} points"
    taken = "no time measured" if latency is None else f"{latency['median'] / 1e6:.2f} ms"
    return f"{row['recipe']} with {lost} and {taken}"
