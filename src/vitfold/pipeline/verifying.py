"""Whether what was written computes what the reference interpreter does, in its engine and its precision.

The bounds: a float graph equals the reference; a rounded one may differ from the simulation of its rounding by no
more than a few times what that rounding costs, for one code that falls on the other side spreads over all that
follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Num

from vitfold.architectures.programs import forward
from vitfold.engines import DEFAULT, Session, describe_execution, open_graph
from vitfold.errors import EngineError
from vitfold.images import ImageSet, batches
from vitfold.model import Architecture, GraphSpec, Model
from vitfold.model.spec import noise
from vitfold.pipeline.plan import Plan
from vitfold.products import products_of_recipe
from vitfold.recipe import MergeRecipe

if TYPE_CHECKING:
    from vitfold.engines.simulation import SimulationSession

IMAGES = 4
FLOAT_ERROR = 1e-4
"""How far a float graph may be from the reference: the median over images of the relative error."""
ROUNDING_FACTOR = 3.0
"""A rounded graph may be as far from its simulation as so many times what the same rounding costs the float model."""
CEILING = 0.1
"""No graph may be farther than this from its simulation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """How far the engine is from the reference: relative errors over images, and what rounding itself costs (or None).

    `largest` is the largest number that half precision has to hold, and its site, where the graph is of that type.
    `narrowed` is how far the engine's floats of fewer bits take it from itself in float32, where it has such. `remark`
    says what an unusual execution on this processor means.
    """

    engine: str
    images: int
    median: float
    maximum: float
    rounding: float | None
    largest: tuple[float, str] | None = None
    narrowed: float | None = None
    remark: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values: dict[str, Any] = {
            "engine": self.engine,
            "images": self.images,
            "median_relative_error": self.median,
            "max_relative_error": self.maximum,
        }
        if self.rounding is not None:
            values["rounding_relative_error"] = self.rounding
        if self.narrowed is not None:
            values["narrow_relative_error"] = self.narrowed
        if self.largest is not None:
            values["largest_value"], values["largest_site"] = self.largest
        return values


def open_written(folded: Plan, onnx_path: Path) -> Session:
    """Open what was written, where its products are exact; a graph for TensorRT runs on ONNX Runtime as it is written.

    Raises:
        EngineError: if the engine is not installed, refuses the graph, or would compute it wrongly on this processor.
    """
    if folded.simulated:
        return simulation(folded)
    products = products_of_recipe(folded.target.to_dict(), folded.recipe.quant)
    if folded.target.runtime.gpu:
        return open_graph(onnx_path, DEFAULT, literal=True)
    return open_graph(onnx_path, folded.target.engine, products=products)


def simulation(folded: Plan) -> SimulationSession:
    """Return the simulation of a plan as a session: of its quantizers, and of half precision if its target has it."""
    from vitfold.engines.simulation import SimulationSession

    return SimulationSession(
        folded.folded.spec,
        folded.folded.params,
        folded.quantizers or {},
        folded.recipe.merge,
        reordered=folded.target.quantized_product == "integer",
        half=folded.target.float_type == "float16",
    )


def run_float(folded: Plan, pixels: Num[np.ndarray, "B ..."]) -> Float[np.ndarray, "B ..."]:
    """Run the loaded model, compensated where it is, with the recipe's merging, nothing rounded."""
    import torch

    from vitfold.ops.run import Run

    with torch.inference_mode():
        model = folded.float_model
        output = forward(Run(model.params), model.spec, folded.recipe.merge, torch.from_numpy(pixels))
    result: Float[np.ndarray, "B ..."] = output.numpy()
    return result


def run_reference(folded: Plan, pixels: Num[np.ndarray, "B ..."]) -> Float[np.ndarray, "B ..."]:
    """Run the recipe in the reference interpreter: the loaded model, or the simulation where anything is rounded."""
    if folded.quantizers is None and folded.target.float_type != "float16":
        return run_float(folded, pixels)
    with simulation(folded) as session:
        return session(pixels)


def verification_images(model: Model, images: ImageSet | None) -> Num[np.ndarray, "B ..."]:
    """Return the first images, prepared, or seeded noise where there are none."""
    if images is not None:
        return next(iter(batches(images.first(IMAGES), model.preprocess, batch=IMAGES))).pixel_values
    return noise(model.spec, IMAGES)


def verify(folded: Plan, pixels: Num[np.ndarray, "B ..."], session: Session) -> Verified:
    """Compare the engine with the reference, image by image; return how far it is.

    The median over images counts, so that one image may differ more, where rounding turned a tie in matching.

    Raises:
        EngineError: if the output is not finite, half precision cannot hold a value, or the difference is too large.
    """
    return _verified(folded, pixels, session, session(pixels))


def _verified(
    folded: Plan, pixels: Num[np.ndarray, "B ..."], session: Session, found: Float[np.ndarray, "B ..."]
) -> Verified:
    """Compare what the engine found with the reference."""
    rounding, largest = None, None
    if folded.quantizers is None and folded.target.float_type != "float16":
        expected, bound = run_float(folded, pixels), FLOAT_ERROR
    else:
        with simulation(folded) as simulated:
            expected = simulated(pixels)
            largest = simulated.check_half()
        rounding = float(np.median(relative_errors(run_float(folded, pixels), expected)))
        bound = bound_for(rounding)
    bound = max(bound, _output_rounding(folded.model.spec))
    if not np.isfinite(found).all():
        raise EngineError("the engine returns NaN or infinite values; the weights overflow float32 on ordinary images")
    errors = relative_errors(expected, found)
    median = float(np.median(errors))
    if not median <= bound:
        raise EngineError(
            f"the engine's output differs from the reference by {median:.1e} relative (bound {bound:.0e}); this is a "
            f"bug in the runtime or in vitfold: upgrade {folded.target.engine}, or try --target portable"
        )
    return Verified(
        engine=session.engine,
        images=len(errors),
        median=median,
        maximum=float(errors.max()),
        rounding=rounding,
        largest=largest,
        remark=describe_execution(session.execution, folded.target.engine),
    )


def verify_written(folded: Plan, pixels: Num[np.ndarray, "B ..."], session: Session, onnx_path: Path) -> Verified:
    """Verify what was written; where its engine narrows floats, in float32 first, then how far that takes it.

    Raises:
        EngineError: if the output is not finite, half precision cannot hold a value, or the difference is too large.
    """
    row = folded.target.runtime
    if not row.narrow_floats or not session.engine.startswith(f"{row.name} "):
        return verify(folded, pixels, session)
    products = products_of_recipe(folded.target.to_dict(), folded.recipe.quant)
    with open_graph(onnx_path, row.exact_floats, products=products) as exact:
        expected = exact(pixels)
        verified = _verified(folded, pixels, exact, expected)
    narrowed, bound = float(np.median(relative_errors(expected, session(pixels)))), _narrow_bound(folded, pixels)
    if not narrowed <= bound:
        raise EngineError(
            f"in bfloat16 the output differs from that in float32 by {narrowed:.1e} relative (bound {bound:.0e}); "
            f"this model needs float32: choose --target {row.exact_floats}"
        )
    return replace(verified, engine=session.engine, narrowed=narrowed)


def _narrow_bound(folded: Plan, pixels: Num[np.ndarray, "B ..."]) -> float:
    """How far floats of fewer bits may take an output: where tokens merge as far as that does, for ties turn then."""
    if not any(folded.recipe.merge.r):
        return CEILING
    unmerged = run_float(replace(folded, recipe=replace(folded.recipe, merge=MergeRecipe(r=()))), pixels)
    return max(CEILING, float(np.median(relative_errors(unmerged, run_float(folded, pixels)))))


def _output_rounding(spec: Architecture) -> float:
    """How far an output is from the reference by its type alone."""
    if not isinstance(spec, GraphSpec) or spec.outputs_of[0].dtype not in ("float16", "float64", "float32"):
        return 0.0
    return 2 * float(np.finfo(spec.outputs_of[0].dtype).eps)


def bound_for(rounding: float) -> float:
    """Return how far an engine may be from a simulation whose rounding costs so much, both relative."""
    return min(CEILING, max(FLOAT_ERROR, ROUNDING_FACTOR * rounding))


def relative_errors(expected: Float[np.ndarray, "B ..."], found: Float[np.ndarray, "B ..."]) -> Float[np.ndarray, " B"]:
    """Return, per image, the largest difference over the largest magnitude; where that is zero, the difference."""
    rows = (len(expected), -1)
    errors: Float[np.ndarray, " B"] = np.abs(found.reshape(rows) - expected.reshape(rows)).max(axis=1)
    scale = np.abs(expected.reshape(rows)).max(axis=1)
    relative: Float[np.ndarray, " B"] = errors / np.where(scale == 0, 1.0, scale)
    return relative
