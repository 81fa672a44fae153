"""Whether a bundle is on this machine what it was where it was made: its files, its graph, its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitfold.artifacts.bundle import Bundle, open_bundle
from vitfold.bench.evaluation import finite_outputs
from vitfold.bench.reference import reference_from_origin
from vitfold.engines import open_session
from vitfold.errors import VitfoldError
from vitfold.model import Model
from vitfold.model.spec import noise
from vitfold.pipeline.plan import optimize
from vitfold.pipeline.verifying import IMAGES, Verified, verify_written


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was checked: the engine that opened and ran the graph on seeded noise, and how far it is from the reference.

    `verified` is None where outputs were not compared, and `reason` says why.
    """

    bundle: Bundle
    engine: str
    verified: Verified | None
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "bundle": str(self.bundle.path),
            "digest": self.bundle.digest,
            "size_bytes": self.bundle.size_bytes,
            "engine": self.engine,
            "at_making": dict(self.bundle.manifest.verified),
            "verified": None if self.verified is None else self.verified.to_dict(),
            "not_compared": self.reason,
        }


def check_bundle(path: str | Path, *, engine: str | None = None, threads: int | None = None) -> Checked:
    """Check every file against its digest, run the graph, and compare with the reference interpreter once more.

    The inputs are seeded noise, as at the making of a bundle without images. The reference is the model that the bundle
    was made from, loaded again; its weights have to be those of then.

    Raises:
        BundleError: if a file is missing, damaged or another one.
        EngineError: if the engine refuses the graph, returns NaN, or differs from the reference.
    """
    bundle = open_bundle(path)
    pixels = noise(bundle.manifest.spec, IMAGES)
    with open_session(bundle, engine=engine, threads=threads) as session:
        finite_outputs(session(pixels), f"seeded noise, input to {bundle.path},")
        verified, reason = None, _obstacle(bundle)
        if reason is None:
            model = _source(bundle)
            if isinstance(model, Model):
                target = str(bundle.manifest.target["name"])
                plan = optimize(model, recipe=bundle.manifest.recipe, target=target)
                verified = verify_written(plan, pixels, session, bundle.onnx_path)
            else:
                reason = model
        return Checked(bundle=bundle, engine=session.engine, verified=verified, reason=reason)


def _obstacle(bundle: Bundle) -> str | None:
    """Say what a comparison needs that no bundle and no source holds; None if there is nothing."""
    recipe = bundle.manifest.recipe
    made_on_images = {
        "quantizers": recipe.quant is not None,
        "refitted weights": bundle.manifest.compensation is not None,
        "registers": recipe.registers is not None,
    }
    for what, there in made_on_images.items():
        if there:
            return (
                f"the reference needs the {what}, which were made on images that the bundle does not hold; compare "
                "with the unfolded model by vitfold evaluate BUNDLE --images DIR"
            )
    return None


def _source(bundle: Bundle) -> Model | str:
    """Return the model that a bundle was made from, or why it is not at hand."""
    try:
        model = reference_from_origin(bundle).model
    except (VitfoldError, ImportError) as error:
        return f"the model that the bundle was made from is not at hand: {error}"
    return "the model that the bundle was made from is not at hand" if model is None else model
