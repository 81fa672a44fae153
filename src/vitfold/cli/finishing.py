"""From a calibrated plan to a bundle in its place: written, raced and judged in the workshop, then renamed once.

Whatever fails or is interrupted before the rename leaves what stood there as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vitfold import pipeline
from vitfold.artifacts.bundle import publish_bundle
from vitfold.cli.optimized import OptimizeResult
from vitfold.cli.terminal import note
from vitfold.errors import GateError, VitfoldError
from vitfold.progress import Say
from vitfold.storage.placing import check_space

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle
    from vitfold.images import ImageSet
    from vitfold.pipeline import Plan
    from vitfold.storage.placing import Place

Race = Callable[["Bundle", "Plan"], "pipeline.Race | None"]
_FLOAT_SHARE, _INTEGER_SHARE = 1.05, 0.35
"""What a graph takes of the bytes of its weights in float32."""


def check_room(place: Place, folded: Plan) -> None:
    """Check that the disk has room for what is going to be written, before the work.

    Raises:
        BundleError: saying how much is needed and how much is free.
    """
    quantizes = folded.recipe.quant is not None and not folded.simulated
    # A race may end with the float graph in place of the quantized one; both stand in the workshop then.
    share = _FLOAT_SHARE + (_INTEGER_SHARE if quantizes else 0.0)
    check_space(place.destination, int(share * folded.model.size_bytes))


def make_bundle(
    folded: Plan,
    comparing: ImageSet | None,
    place: Place,
    say: Say,
    *,
    race: Race | None,
    merging: Race | None = None,
    keep_slower: bool,
) -> OptimizeResult:
    """Write the bundle in the workshop, and, after a `race` that it lost and unless told to keep it, the float one.

    `merging` is the race against the same without merging, which is reported and decides nothing.
    """
    bundle = pipeline.save(folded, place.draft("made"), images=comparing, step=say)
    result = None
    if race is not None:
        say("racing the float model")
        result = race(bundle, folded)
        if result is not None and not result.faster and not keep_slower:
            folded = pipeline.float_plan(folded)
            bundle = pipeline.save(folded, place.draft("float"), images=comparing, step=say)
    merged = None
    if merging is not None and any(folded.recipe.merge.r):
        say("racing the same without merging")
        try:
            merged = merging(bundle, folded)
        except (VitfoldError, OSError) as error:  # no room for it, say: the bundle stands
            note(f"merging was not raced against none: {error}")
    return OptimizeResult(folded=folded, bundle=bundle, race=result, merging=merged)


def publish(made: OptimizeResult, place: Place, min_agreement: float | None) -> OptimizeResult:
    """Put a bundle that passes its gate in its place; one that fails goes with the workshop."""
    assert made.bundle is not None
    try:
        if min_agreement is not None:
            check_agreement(made.bundle.manifest.fidelity, min_agreement)
    except GateError as error:
        left = f"{place.destination} is as it was" if place.destination.exists() else "nothing was written"
        return replace(made, missed=f"{error}; {left}")
    return replace(made, bundle=publish_bundle(place, made.bundle), kept=tuple(place.kept))


def check_agreement(fidelity: Any, least: float) -> None:
    """Check a measured fidelity against --min-agreement.

    Raises:
        GateError: if it is lower, or was not measured.
    """
    agreement = None if fidelity is None else fidelity["agreement"]
    if agreement is None:
        raise GateError(
            "agreement was not measured: random weights, or a model that gives embeddings or numbers; for embeddings "
            "gate on cosine with: vitfold evaluate --min-cosine, for a regression with: vitfold evaluate --max-error"
        )
    if agreement < least:
        raise GateError(f"agreement {agreement:.4f} is below --min-agreement {least}; lower --merge")
